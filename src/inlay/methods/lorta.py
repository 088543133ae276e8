"""LoRTA trains one tensor for the attention of a whole model, as a sum of r outer products.

    ΔW_{l,j,h} = B diag(C_L[l] ∘ C_M[j] ∘ C_H[h]) Aᵀ   for head h (out) of q, k, v;   its transpose for head h (in) of o
    A (d × r), B (head × r) = 0, C_L (layers × r), C_M (matrices × r), C_H (heads × r)

Hounie et al. 2024, "LoRTA: Low Rank Tensor Adaptation of Large Language Models", arXiv 2410.04060. All five factors are
shared by all layers: r (d + head + layers + matrices + heads) parameters in total. No more is built than one layer's
factors. [ours]: k and v with fewer heads use the first of C_H; A has variance 1/d and the C variance 1; weights outside
attention form a tensor of their own for each shape, with one head. The factors of a model on several devices are on the
device of its first layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.method import LowRank, Params


@dataclass(frozen=True, kw_only=True)
class LoRTA(LowRank):
    name = "lorta"
    title = "LoRTA: one tensor for all layers"
    equation = "ΔW_{l,j,h} = B diag(C_L[l] ∘ C_M[j] ∘ C_H[h]) Aᵀ"
    paper = "Hounie et al. 2024, arXiv 2410.04060"
    trains = "A (d × r), B (head × r), C_L, C_M, C_H; one of each for all layers"
    shared = frozenset({"A", "B", "C_L", "C_M", "C_H"})
    zero_init = True
    draws = True  # type: ignore[assignment]

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        at, (side, d) = self.place, reversed(W.shape) if self.place.writes else W.shape
        A, C_L, C_M, C_H = (torch.randn(n, self.r, device=W.device) for n in (d, at.layers, at.modules, at.most))
        return {"A": A / d**0.5, "B": torch.zeros(side // at.heads, self.r, device=W.device),
                "C_L": C_L, "C_M": C_M, "C_H": C_H}  # fmt: skip

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        at = self.place
        C = p["C_L"][at.layer] * p["C_M"][at.module] * p["C_H"][: at.heads]
        heads = (C[:, None] * p["B"]).flatten(0, 1)
        return (p["A"], heads.T) if at.writes else (heads, p["A"].T)
