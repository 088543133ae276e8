"""LoLDU trains the pivots of the weight's LDU factorisation and keeps its triangles fixed.

    W = P L D U,   ΔW = B diag(z) A,   B = P L_r (out × r) and A = U_r (r × in) frozen,   z₀ = D_r

Shi et al. 2024, "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
arXiv 2410.13618. L and U have unit diagonals; the paper's s is α / r (`scale`). The first r pivots are no approximation
of W (the rest can be several times its norm), so only the host's offset form makes sense: the change is P L_r diag(z −
z₀) U_r. The published code builds P, out × out, and ΔW in every pass; a permuted L_r is all that is needed, and only
U_r x, r wide, is kept for the backward pass. It trains r parameters per weight: choose a large r.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inlay.method import Diagonal, Params, check_rank
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class LoLDU(Diagonal):
    name = "loldu"
    title = "LoLDU: the pivots of an LDU factorisation"
    equation = "ΔW = P L_r diag(z) U_r"
    paper = "Shi et al. 2024, arXiv 2410.13618"
    trains = "z (r)"
    roles = {"z": "magnitude"}

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        B, z, A = linalg.ldu(W, self.r)
        return {"A": A, "B": B, "z": z}
