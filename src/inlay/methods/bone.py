"""Bone trains one block shared by all input blocks of the weight.

    D (r × out) = 0;   S = Σ_j x[jr : (j+1)r];   y = W x + s Dᵀ S,   that is   ΔW[o, c] = D[c mod r, o]

Kang 2024, "Bone: Block-Affine Adaptation of Large Language Models", arXiv 2409.15371 v4 on (later DiSHA, MiSS). ΔW = B
A with B = Dᵀ and a frozen A = [I I ... I]: a LoRA whose A needs no memory, so only S (r wide) is kept for the backward
pass. Where r does not divide `in`, the last block is short. The tiled A makes the effective step √(in / r) times
LoRA's: at a fixed learning rate this explains much of its fast convergence and of its forgetting, and is why Inlay
offers s, which the paper does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.method import LowRank, Params
from inlay.numerics import ops


@dataclass(frozen=True, kw_only=True)
class Bone(LowRank):
    name = "bone"
    title = "Bone: one block shared by all blocks of the weight"
    equation = "ΔW = Dᵀ [I I ... I]"
    paper = "Kang 2024, arXiv 2409.15371"
    trains = "D (r × out)"
    zero_init = True
    roles = {"D": "out"}

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        out, inp = W.shape
        if self.r > inp:
            raise ValueError(f"bone: r={self.r} is larger than the {inp} inputs of the weight; choose r <= {inp}")
        return {"D": torch.zeros(self.r, out, device=W.device)}

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        D, inp = p["D"], W.shape[1]
        return D.T, torch.eye(self.r, dtype=D.dtype, device=D.device).repeat(1, -(-inp // self.r))[:, :inp]

    def written(self, p: Params, p0: Params | None) -> tuple[ops.Factors, tuple[Tensor]]:
        return ops.Pair(self.s), (p["D"].T,)
