"""LoRA trains a low-rank update beside the weight, the reference for all comparisons.

    ΔW = B A,   B (out × r) = 0,   A (r × in) Kaiming-uniform,   s = α / r

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Plain on purpose: it does not
read W. If another method does not beat it with a tuned learning rate, use LoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    name = "lora"
    title = "LoRA: low-rank update beside the weight"
    equation = "ΔW = (α/r) B A"
    paper = "Hu et al. 2021, arXiv 2106.09685"
    trains = "A (r × in), B (out × r)"
    zero_init = True
    draws = True  # type: ignore[assignment]

    alpha: float | None = field(default=None, metadata={"help": "s = alpha / r; give alpha or scale, not both"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora: alpha={self.alpha} is not above 0")
        if self.alpha is not None and self.scale is not None:
            raise ValueError(f"lora: alpha={self.alpha} and scale={self.scale} both set s; give one of them")

    @property
    def factor(self) -> float:
        return (self.scale or 1.0) if self.alpha is None else self.alpha / self.r

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        out, inp = W.shape
        A = torch.empty(self.r, inp, device=W.device)
        # nn.Linear's own start, which the paper's code uses: uniform with variance 1 / (3 in).
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return {"A": A, "B": torch.zeros(out, self.r, device=W.device)}
