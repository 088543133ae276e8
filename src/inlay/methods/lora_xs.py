"""LoRA-XS trains one small square matrix between the principal singular vectors of the weight.

    W = U Σ Vᵀ,   ΔW = B R A,   B = U_r Σ_r and A = V_rᵀ frozen,   R (r × r) = 0

Bałazy, Banaei, Aberer, Tabor 2024, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv
2405.17604. r² numbers per weight, whatever its width. The paper draws R with a standard deviation of 1e-5; here it is 0
[ours], which changes no first step that can be seen, and starts exactly. The frozen factors are stored with the adapter
(nothing is decomposed again), as large as a LoRA's; of x only V_rᵀ x is kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class LoRAXS(LowRank):
    name = "lora_xs"
    title = "LoRA-XS: a square matrix between singular vectors"
    equation = "ΔW = U_r Σ_r R V_rᵀ"
    paper = "Bałazy et al. 2024, arXiv 2405.17604"
    trains = "R (r × r)"
    frozen = frozenset({"A", "B"})
    zero_init = True

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        U, S, Vh = linalg.top_svd(W, self.r)
        return {"A": Vh, "B": U * S, "R": torch.zeros(self.r, self.r, device=W.device)}

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        return p["B"] @ p["R"], p["A"]
