"""PiSSA trains the principal singular components of the weight.

    W = U Σ Vᵀ,   ΔW = B A,   B₀ = U_r √(Σ_r / s),   A₀ = √(Σ_r / s) V_rᵀ     (the first r triplets)

Meng, Wang, Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", arXiv 2404.02948, eq. 2-4.
The paper's residual W − s B₀ A₀ is the host's offset form; W itself is kept. Its learning rates are small (2e-5).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inlay.method import LowRank, Params, check_rank
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class PiSSA(LowRank):
    name = "pissa"
    title = "PiSSA: the principal singular components"
    equation = "ΔW = B A from the r largest triplets of W"
    paper = "Meng et al. 2024, arXiv 2404.02948"
    trains = "A (r × in), B (out × r)"

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        U, S, Vh = linalg.top_svd(W, self.r)
        root = (S / self.s).sqrt()
        return {"A": root[:, None] * Vh, "B": U * root}
