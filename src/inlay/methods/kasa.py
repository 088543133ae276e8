"""KaSA drops the weight's smallest singular triplets and learns others in their place, with values that are trained.

    s ΔW = s B diag(σ) A − U_m Σ_m V_mᵀ,   B = 0,   A Kaiming-uniform,   σ (r) ~ N(0, 1)     (m: the last r triplets)
    beside the loss:   β ‖σ‖² + γ (‖Bᵀ B − I‖_F + ‖A Aᵀ − I‖_F),   in the mean over the weights

Wang et al. 2024, "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", arXiv 2412.06071. So the
model does not start exactly at the pretrained one. β, γ and α are the published code's. Its norms are of A Aᵀ and Bᵀ B
with their sides exchanged, (in × in) and (out × out); these here are (r × r), as in the paper. Where in > out, it drops
triplets that W does not have; here they are the last r of min(in, out).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class KaSA(LowRank):
    name = "kasa"
    title = "KaSA: trained singular values in place of the smallest"
    equation = "ΔW = (α/r) B diag(σ) A − the r smallest triplets of W"
    paper = "Wang et al. 2024, arXiv 2412.06071"
    trains = "A (r × in), B (out × r), σ (r)"
    frozen = frozenset({"U", "V"})
    roles = {"A": "in", "B": "out", "sigma": "magnitude"}
    departs = True
    draws = True  # type: ignore[assignment]

    alpha: float = field(default=16.0, metadata={"help": "s = α / r, unless scale is given (KaSA)", "above": 0})
    beta: float = field(default=1e-4, metadata={"help": "weight of KaSA's penalty on its singular values", "min": 0})
    gamma: float = field(default=1e-3, metadata={"help": "weight of KaSA's penalty on skewness", "min": 0})

    @property
    def factor(self) -> float:
        return self.scale or self.alpha / self.r

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        U, S, Vh = linalg.svd(W, self.r, "minor")
        root, A = (S / self.factor).sqrt(), torch.empty(self.r, W.shape[1], device=W.device)
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B, sigma = torch.zeros(W.shape[0], self.r, device=W.device), torch.randn(self.r, device=W.device)
        return {"A": A, "B": B, "sigma": sigma, "U": U * root, "V": root[:, None] * Vh}

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([p["B"] * p["sigma"], -p["U"]], 1), torch.cat([p["A"], p["V"]])

    def penalty(self, p: Params) -> Tensor:
        eye = torch.eye(self.r, device=p["A"].device)
        apart = [torch.linalg.matrix_norm(M - eye) for M in (p["B"].mT @ p["B"], p["A"] @ p["A"].mT)]
        return self.beta * p["sigma"].square().sum() + self.gamma * (apart[0] + apart[1])
