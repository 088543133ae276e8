"""Deep LoRA trains three factors from a small orthogonal start, which find a low rank by themselves.

    ΔW = W₃ W₂ W₁,   W₁ (r × in), W₂ (r × r), W₃ (out × r) orthogonal times ε

Yaras, Wang, Balzano, Qu 2024, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation", arXiv
2406.04112. From a small start gradient descent on a deep product raises few singular values: r is an upper bound, not a
choice, and little overfits where data are few. ΔW(θ₀) is ε³ large and offset. This is the factorisation of width r, as
in the published code; the paper's compressed form (outer factors from the first gradient, at a learning rate of their
own) needs a gradient first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank


@dataclass(frozen=True, kw_only=True)
class DeepLoRA(LowRank):
    name = "deep_lora"
    title = "Deep LoRA: three factors from a small orthogonal start"
    equation = "ΔW = W₃ W₂ W₁"
    paper = "Yaras et al. 2024, arXiv 2406.04112"
    trains = "W1 (r × in), W2 (r × r), W3 (out × r)"
    roles = {"W1": "in", "W3": "out"}
    draws = True  # type: ignore[assignment]

    epsilon: float = field(default=1e-3, metadata={"help": "size ε of the orthogonal start", "above": 0})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        (out, inp), r = W.shape, self.r
        p = {k: torch.empty(s, device=W.device) for k, s in (("W1", (r, inp)), ("W2", (r, r)), ("W3", (out, r)))}
        for factor in p.values():
            torch.nn.init.orthogonal_(factor, gain=self.epsilon)
        return p

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        return p["W3"] @ p["W2"], p["W1"]
