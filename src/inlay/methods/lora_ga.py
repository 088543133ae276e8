"""LoRA-GA is LoRA whose first step follows the gradient of full fine-tuning.

    G = mean gradient of W = U S Vᵀ,  ΔW = B A,  A₀ = c V_{1..r}ᵀ,  B₀ = c U_{r+1..2r},  c = out^¼ / √γ,  s = α / √r

Wang, Yu, Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000. The paper's residual W
− s B₀ A₀ is the host's offset form. PEFT's `lora_ga` scales by the gradient's singular values, unlike this. Of the
summed gradients about the 4 r largest triplets are kept from batch to batch [ours], so that no gradient stays in
memory; how near that comes to the SVD of the mean itself is measured in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_seen
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class LoRAGA(LowRank):
    name = "lora_ga"
    title = "LoRA-GA: a first step along the full gradient"
    equation = "ΔW = (α/√r) B A from the singular vectors of the gradient"
    paper = "Wang et al. 2024, arXiv 2407.05000"
    trains = "A (r × in), B (out × r)"
    needs = "gradients"

    alpha: float = field(default=16.0, metadata={"help": "α; s = α / √r, unless scale is given (LoRA-GA)", "above": 0})
    gamma: float = field(default=16.0, metadata={"help": "γ: the larger, the smaller LoRA-GA's start", "above": 0})

    @property
    def factor(self) -> float:
        return self.scale or self.alpha / math.sqrt(self.r)

    def observe(self, stats: Params, seen: Tensor) -> Params:
        """Return U (out × k), S (k,), V (k × in) of the gradients' sum; these vectors are also those of their mean."""
        return linalg.add_to_svd(stats, seen, 4 * self.r)

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        (out, inp), r = W.shape, self.r
        if 2 * r > min(W.shape):
            raise ValueError(
                f"lora_ga: r={r} takes 2 r triplets of the gradient, more than the {out} × {inp} weight has; "
                f"choose r <= {min(W.shape) // 2}"
            )
        if W.is_meta:
            return {"A": torch.empty(r, inp, device="meta"), "B": torch.empty(out, r, device="meta")}
        seen, c = check_seen(self, stats), out**0.25 / math.sqrt(self.gamma)
        return {"A": c * seen["V"][:r].to(W.device), "B": c * seen["U"][:, r : 2 * r].to(W.device)}
