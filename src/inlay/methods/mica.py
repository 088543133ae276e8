"""MiCA writes into the left singular vectors of the weight that matter least, and trains what they read.

    W = U Σ Vᵀ,   ΔW = B A,   B = U[:, −r:] frozen,   A (r × in) = 0

Rüdiger, Raschka 2026, "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning", arXiv 2604.01694 (Minor Component
Adaptation), meant for continued pretraining. Where MiLoRA only starts in the minor subspace, this stays in it: the
outputs change by nothing along the other left singular vectors. Half of a LoRA's numbers are trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class MiCA(LowRank):
    name = "mica"
    title = "MiCA: into the minor left singular vectors"
    equation = "ΔW = U[:, −r:] A"
    paper = "Rüdiger, Raschka 2026, arXiv 2604.01694"
    trains = "A (r × in)"
    frozen = frozenset({"B"})
    zero_init = True

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        B = linalg.svd(W, self.r, "minor")[0]
        return {"A": torch.zeros(self.r, W.shape[1], device=W.device), "B": B.contiguous()}
