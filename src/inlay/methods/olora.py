"""OLoRA starts from the QR factors of the weight.

    W = Q R (thin),   ΔW = B A,   B₀ = Q_r (the first r columns),   A₀ = R_r (the first r rows)

Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775. The paper's
residual W − s B₀ A₀ is the host's offset form. B₀ is orthonormal and A₀ carries all of the norm. The QR is not pivoted,
so B₀ spans the first r columns of W, whatever they are: it holds less of W than PiSSA's start, and is cheaper to
compute.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inlay.method import LowRank, Params, check_rank
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class OLoRA(LowRank):
    name = "olora"
    title = "OLoRA: the QR factors of the weight"
    equation = "ΔW = B A from the first r columns and rows of W = Q R"
    paper = "Büyükakyüz 2024, arXiv 2406.01775"
    trains = "A (r × in), B (out × r)"

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        B, A = linalg.qr(W, self.r)
        return {"A": A, "B": B}
