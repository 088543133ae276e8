"""PSOFT turns the weight within its principal subspace, and stretches it a little there.

    ΔW = B (diag(b) R diag(a) − I) A,   B = U_r Σ_r and A = V_rᵀ frozen,   R = (I + Q)(I − Q)⁻¹,   Q = −Qᵀ

Wu et al. 2025, "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", arXiv 2505.11235. q holds the
entries of Q above its diagonal, 0 at the start, where a = b = 1. With a and b at 1 the angles between what A reads stay
as they are; s ≠ 1 would undo that and is refused. R comes from an exact solve in fp32, not from a Neumann series. The
frozen factors are stored with the adapter; of x only V_rᵀ x is kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class PSOFT(LowRank):
    name = "psoft"
    title = "PSOFT: a rotation of the principal subspace"
    equation = "ΔW = U_r Σ_r (diag(b) R diag(a) − I) V_rᵀ"
    paper = "Wu et al. 2025, arXiv 2505.11235"
    trains = "q (r (r − 1) / 2), a (r), b (r)"
    frozen = frozenset({"A", "B"})
    roles = {"a": "magnitude", "b": "magnitude"}
    zero_init = True
    scales = False

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        U, S, Vh = linalg.top_svd(W, self.r)
        one = torch.ones(self.r, device=W.device)
        q = torch.zeros(self.r * (self.r - 1) // 2, device=W.device)
        return {"A": Vh, "B": U * S, "q": q, "a": one, "b": one.clone()}

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        q, a, b = (p[k].to(torch.promote_types(p[k].dtype, torch.float32)) for k in "qab")
        eye = torch.eye(self.r, dtype=q.dtype, device=q.device)
        half = torch.zeros_like(eye).index_put(tuple(torch.triu_indices(self.r, self.r, 1, device=q.device)), q)
        Q = half - half.T
        R = torch.linalg.solve(eye - Q, eye + Q, left=False)
        return p["B"] @ (b[:, None] * R * a - eye).to(p["B"].dtype), p["A"]
