"""PEANuT (first called NEAT) applies a small network to the weight itself as the update.

    ΔWᵀ = ReLU(Wᵀ A) B,   A (out × r) Kaiming-uniform,   B (r × out) = 0

Zhong et al. 2024, "NEAT: Nonlinear Parameter-efficient Adaptation of Pre-trained Models", arXiv 2410.01870, without
hidden layers (depth 0). ΔW depends on W and still has rank r: y = W x + s Bᵀ ReLU(Aᵀ W) x costs a pass of r tokens more
than LoRA. For the backward pass x and r numbers per token are kept; ReLU(Aᵀ W) is built again, a quantised W read
again. As with Bat, several of them do not commute, and merging uses the unmerged W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank


@dataclass(frozen=True, kw_only=True)
class PEANuT(LowRank):
    name = "peanut"
    title = "PEANuT (NEAT): a small network on the weight"
    equation = "ΔWᵀ = ReLU(Wᵀ A) B"
    paper = "Zhong et al. 2024, arXiv 2410.01870"
    trains = "A (out × r), B (r × out)"
    zero_init = True
    reads_weight = True
    draws = True  # type: ignore[assignment]

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        A = torch.empty(self.r, W.shape[0], device=W.device)
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return {"A": A.T.contiguous(), "B": torch.zeros(self.r, W.shape[0], device=W.device)}

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        return p["B"].T, torch.relu(p["A"].T @ W.to(p["A"].dtype))
