"""XGBLoRA boosts: it trains a LoRA of rank 1 on a few layers for a while, adds it to the model, and restarts.

    ΔW = Σ_k B_k A_k,   round k trains B_k (out × r) = 0 and A_k (r × in) Kaiming-uniform, in L_s layers drawn at random

Zhang et al. 2024, "Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of LLMs", arXiv
2410.19694. A round lasts κ = steps / `rounds` optimiser steps; the optimiser then forgets the pair. The paper merges it
into W. [ours]: W is never touched, and finished rounds are kept as factors in fp32 (`A_past`, `B_past`), so that
nothing is rounded away, a quantised base serves, and all of it can be removed again: ΔW ends as a LoRA of rank r
`rounds`, of which a step trains rank r. L_s is half of the layers by default [ours]; the others compute no gradient in
that round. The draws follow from `round_seed`, in every process the same.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import LowRank, Params


@dataclass(frozen=True, kw_only=True)
class XGBLoRA(LowRank):
    name = "xgblora"
    title = "XGBLoRA: a sum of rank-1 updates, one after another"
    equation = "ΔW = Σ_k B_k A_k, a k at a time"
    paper = "Zhang et al. 2024, arXiv 2410.19694"
    trains = "A (r × in), B (out × r), anew in each round"
    frozen = frozenset({"A_past", "B_past", "round"})
    zero_init = True
    draws = True  # type: ignore[assignment]

    r: int = field(default=1, metadata={"help": "rank of each round", "min": 1})
    rounds: int = field(default=16, metadata={"help": "rounds of the training", "min": 2})
    layers_per_round: int | None = field(default=None, metadata={"help": "L_s, drawn again (default: half)", "min": 1})
    round_seed: int = field(default=0, metadata={"help": "seed of the draws of each round", "min": 0})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        (out, inp), past = W.shape, self.r * (self.rounds - 1)
        shapes = {"A": (self.r, inp), "B": (out, self.r), "A_past": (past, inp), "B_past": (out, past)}
        p = {k: torch.zeros(shape, device=W.device) for k, shape in shapes.items()}
        torch.nn.init.kaiming_uniform_(p["A"], a=math.sqrt(5))
        return {**p, "round": torch.zeros(1, dtype=torch.int32, device=W.device)}

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([p["B_past"], p["B"]], 1), torch.cat([p["A_past"], p["A"]])

    def restart(self, p: Params, t: float) -> dict[str, Tensor | None]:
        done, now = int(p["round"]), self.round(t)
        if now <= done:
            return {}
        block = slice(done * self.r, (done + 1) * self.r)
        p["A_past"][block], p["B_past"][:, block] = p["A"], p["B"]
        bound, draw = p["A"].shape[1] ** -0.5, self.generator(now, self.place.layer, self.place.module)
        p["A"].copy_(torch.empty(p["A"].shape).uniform_(-bound, bound, generator=draw))
        p["B"].zero_()
        p["round"].fill_(now)
        return {"A": None, "B": None}

    def schedule(self, p: Params, t: float) -> frozenset[str]:
        order = torch.randperm(self.place.layers, generator=self.generator(self.round(t)))
        picked = order[: self.layers_per_round or (self.place.layers + 1) // 2]
        return frozenset() if self.place.layer in picked.tolist() else frozenset({"A", "B"})

    def round(self, t: float) -> int:
        return min(int(t * self.rounds + 1e-6), self.rounds - 1)

    def generator(self, *numbers: int) -> torch.Generator:
        digest = hashlib.sha256(repr((self.round_seed, *numbers)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
