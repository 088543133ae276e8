"""LoRA-One takes one step of full fine-tuning, as far as a rank goes, before it trains as a LoRA.

    G = mean gradient of W = U Σ Vᵀ,   ΔW = B A,   B₀ = −U_r √(Σ_r / γ σ₁),   A₀ = √(Σ_r / γ σ₁) V_rᵀ,   s = α / √r

Zhang, Liu, Chen 2025, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably
and Efficiently", arXiv 2502.01235. So the model starts a step away from the pretrained one, unlike LoRA-GA's. As in
the published code Σ is divided by its largest value σ₁, which its README leaves out. No preconditioner [ours]: the
published script runs without, and AdamW has its own. Of the summed gradients about the 4 r largest triplets are kept
from batch to batch, as for LoRA-GA [ours].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank, check_seen
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class LoRAOne(LowRank):
    name = "lora_one"
    title = "LoRA-One: one full gradient step first"
    equation = "ΔW = (α/√r) B A, B₀ A₀ a step along the gradient"
    paper = "Zhang et al. 2025, arXiv 2502.01235"
    trains = "A (r × in), B (out × r)"
    needs = "gradients"
    departs = True

    alpha: float = field(default=16.0, metadata={"help": "α; s = α / √r, unless scale is given (LoRA-One)", "above": 0})
    gamma: float = field(default=128.0, metadata={"help": "γ: the larger, the shorter LoRA-One's step", "above": 0})

    @property
    def factor(self) -> float:
        return self.scale or self.alpha / math.sqrt(self.r)

    def observe(self, stats: Params, seen: Tensor) -> Params:
        """Return U (out × k), S (k,), V (k × in) of the gradients' sum."""
        return linalg.add_to_svd(stats, seen, 4 * self.r)

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        if W.is_meta:
            return dict(zip("BA", linalg.svd(W, self.r, "top")[::2], strict=True))
        U, S, V = (check_seen(self, stats)[k].to(W.device) for k in "USV")
        root = (S[: self.r] / (self.gamma * S[0].clamp(min=torch.finfo(S.dtype).tiny))).sqrt()
        return {"B": -U[:, : self.r] * root, "A": root[:, None] * V[: self.r]}
