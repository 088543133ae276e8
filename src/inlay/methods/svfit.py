"""SVFit trains the largest singular values of the weight and keeps its singular vectors fixed.

    W = U Σ Vᵀ,   ΔW = B diag(σ) A,   B = U_r and A = V_rᵀ frozen,   σ₀ = the r largest singular values

Sun et al. 2024, "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", arXiv
2409.05926. Only r parameters per weight are trained: the paper takes r = 768 to 1024, nearly all of them, and high
learning rates. The frozen vectors are stored with the adapter (nothing is decomposed again), as large as a LoRA's
factors; of x only V_rᵀ x is kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inlay.method import Diagonal, Params, check_rank
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class SVFit(Diagonal):
    name = "svfit"
    title = "SVFit: the largest singular values"
    equation = "ΔW = U_r diag(σ) V_rᵀ"
    paper = "Sun et al. 2024, arXiv 2409.05926"
    trains = "σ (r)"
    roles = {"sigma": "magnitude"}

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        U, S, Vh = linalg.top_svd(W, self.r)
        return {"A": Vh, "B": U, "sigma": S}
