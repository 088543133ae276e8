"""CorDA decomposes the weight as the layer's inputs see it, and trains the part that matters most or least to them.

    W C = U Σ Vᵀ,   C = mean of X Xᵀ,   ΔW = B A,   B₀ = U_r √(Σ_r / s),   A₀ = √(Σ_r / s) V_rᵀ C⁻¹

Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", arXiv 2406.05223.
`mode="ipm"` previews the instructions: the r largest triplets, with the data to learn. `"kpm"` preserves knowledge: the
r smallest, so calibrate it with the data to keep. As in the published code, each batch is divided by its largest input,
and C gets .01 of its mean diagonal on the diagonal, doubled until its inverse is right to .05; the inverse is in fp64.
The calibration holds C, (in × in), for each distinct input.
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
        C = damped(check_seen(self, stats)["C"].to(W.device).double())
        U, S, Vh = linalg.svd((W.double() @ C).float(), self.r, "top" if self.mode == "ipm" else "minor")
        root = (S / self.s).sqrt()
        return {"B": U * root, "A": root[:, None] * torch.linalg.solve(C, Vh.mT.double()).mT.float()}


def damped(C: Tensor) -> Tensor:
    """Return C with enough on its diagonal to be inverted."""
    eye, damp = torch.eye(len(C), dtype=C.dtype, device=C.device), 0.01
    mean = C.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while torch.dist((D := C + damp * mean * eye) @ torch.linalg.inv(D), eye) >= 0.05:
        damp *= 2
    return D
