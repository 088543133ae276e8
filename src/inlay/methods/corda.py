"""CorDA decomposes the weight as the layer's inputs see it, and trains the part that matters most or least to them.

    W C = U Σ Vᵀ,   C = mean of X Xᵀ,   ΔW = B A,   B₀ = U_r √(Σ_r / s),   A₀ = √(Σ_r / s) V_rᵀ C⁻¹

Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", arXiv 2406.05223.
`mode="ipm"` previews the instructions: the r largest triplets, with the data to learn. `"kpm"` preserves knowledge: the
r smallest, so calibrate it with the data to keep. As in the published code, each batch is divided by its largest input,
and C gets .01 of its mean diagonal on the diagonal. C is never inverted [ours], because Σ_r V_rᵀ C⁻¹ = U_rᵀ W, so that
B₀ A₀ is U_r U_rᵀ W to rounding. The calibration holds C, (in × in), for each distinct input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank, check_seen
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class CorDA(LowRank):
    name = "corda"
    title = "CorDA: the weight as its inputs see it"
    equation = "ΔW = B A from triplets of W C, C the covariance of the inputs"
    paper = "Yang et al. 2024, arXiv 2406.05223"
    trains = "A (r × in), B (out × r)"
    needs = "activations"

    mode: Literal["ipm", "kpm"] = field(
        default="ipm",
        metadata={"help": "CorDA's instruction-previewed or knowledge-preserved mode", "choices": ("ipm", "kpm")},
    )

    def statistic(self, seen: Tensor) -> Params:
        X = seen / seen.max().abs().clamp(min=torch.finfo(seen.dtype).tiny)
        return {"C": X.mT @ X}

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        if W.is_meta:
            return dict(zip("BA", linalg.svd(W, self.r, "top")[::2], strict=True))
        C = check_seen(self, stats)["C"].to(W.device)
        seen = W @ C + 0.01 * C.diagonal().mean() * W
        U, S, _ = linalg.svd(seen, self.r, "top" if self.mode == "ipm" else "minor")
        S = S.clamp(min=max(linalg.ROUNDING * seen.abs().max().item(), torch.finfo(S.dtype).tiny))
        return {"B": U * (S / self.s).sqrt(), "A": U.mT @ W / (S * self.s).sqrt()[:, None]}
