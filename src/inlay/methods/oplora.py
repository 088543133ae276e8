"""OPLoRA is a LoRA that cannot touch the k principal singular triplets of the weight.

    W = U Σ Vᵀ,   ΔW = (I − U_k U_kᵀ) B A (I − V_k V_kᵀ),   B (out × r) = 0,   A (r × in) Kaiming-uniform

Xiong, Xie 2025, "OPLoRA: Orthogonal Projection LoRA Prevents Catastrophic Forgetting during Parameter-Efficient
Fine-Tuning", arXiv 2510.13003 (AAAI 2026). W + ΔW has the same k triplets, exactly: U_kᵀ ΔW = 0 and ΔW V_k = 0. The
projections are applied to the thin factors, so that a pass costs 2 k r (out + in) more than LoRA's; U_k and V_k are
stored with the adapter. k = r unless it is given is [ours], and so is s = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class OPLoRA(LowRank):
    name = "oplora"
    title = "OPLoRA: orthogonal to the principal singular vectors"
    equation = "ΔW = (I − U_k U_kᵀ) B A (I − V_k V_kᵀ)"
    paper = "Xiong, Xie 2025, arXiv 2510.13003"
    trains = "A (r × in), B (out × r)"
    frozen = frozenset({"U", "V"})
    zero_init = True
    draws = True  # type: ignore[assignment]

    k: int | None = field(default=None, metadata={"help": "triplets that OPLoRA keeps (default: r)", "min": 1})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        k = self.k or self.r
        if k + self.r > min(W.shape):
            raise ValueError(
                f"oplora: k={k} leaves less than r={self.r} of the {W.shape[0]} × {W.shape[1]} weight's triplets; "
                f"choose k and r with k + r <= {min(W.shape)}"
            )
        U, _, Vh = linalg.top_svd(W, k)
        A = torch.empty(self.r, W.shape[1], device=W.device)
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return {"A": A, "B": torch.zeros(W.shape[0], self.r, device=W.device), "U": U, "V": Vh.mT.contiguous()}

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        A, B, U, V = (p[k] for k in ("A", "B", "U", "V"))
        return B - U @ (U.mT @ B), A - (A @ V) @ V.mT
