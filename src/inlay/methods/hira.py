"""HiRA multiplies the weight entry by entry with a low-rank matrix, which gives an update of high rank.

    ΔW = W ∘ (B A),   B (out × r) = 0,   A (r × in) Kaiming-uniform

Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
ICLR 2025. ΔW depends on W, which is read again in each pass (a quantised one is dequantised), and is built a few rows
at a time. Several of them do not commute, and a weight of 0 stays 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import Base, Method, Params, check_rank
from inlay.numerics import ops


@dataclass(frozen=True, kw_only=True)
class HiRA(Method):
    name = "hira"
    title = "HiRA: the weight times a low-rank matrix, entry by entry"
    equation = "ΔW = W ∘ (B A)"
    paper = "Huang et al. 2025, ICLR 2025"
    trains = "A (r × in), B (out × r)"
    size = "r"
    zero_init = True
    reads_weight = True
    roles = {"A": "in", "B": "out"}
    draws = True  # type: ignore[assignment]

    r: int = field(default=32, metadata={"help": "rank of the factor", "min": 1})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        A = torch.empty(self.r, W.shape[1], device=W.device)
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return {"A": A, "B": torch.zeros(W.shape[0], self.r, device=W.device)}

    def delta(self, p: Params, W: Tensor) -> Tensor:
        return W.to(p["A"].dtype) * (p["B"] @ p["A"])

    def rows(self, p: Params, p0: Params | None, base: Base) -> ops.Rows:
        return ops.Rows(
            lambda A, B: (A, self.s * B, base.weight),
            lambda i, j, A, B, W: W[i:j].to(A.dtype) * (B[i:j] @ A),
            out=len(p["B"]),
            step=1,
        )
