"""SpIEL trains k entries of the weight, and changes which ones during training.

    ΔW = scatter(η, φ),   η (k) different positions, φ (k) = 0,   k = r (out + in) as in a LoRA

Ansell et al. 2024, "Scaling Sparse Fine-Tuning to Large Language Models", arXiv 2401.16405 (SpIEL-AG). The first
quarter of each round (20 steps in the paper) sums g, the gradient of the k entries where it is largest at first. Then a
share `rate` (1 − t) of η, with the smallest |φ| (of the first η, drawn: all), yields to the largest |g|. [ours]: new
entries have no moments. ΔW and its gradient are dense, never kept. Processes share candidates and g. Compiled, η stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import Base, Drop, Method, Params, keep
from inlay.numerics import ops


@dataclass(frozen=True, kw_only=True)
class SpIEL(Method):
    name = "spiel"
    title = "SpIEL: single entries, which are dropped and grown"
    equation = "ΔW = scatter(η, φ)"
    paper = "Ansell et al. 2024, arXiv 2401.16405"
    trains = "φ (k), k = r (out + in)"
    size = "r"
    frozen = frozenset({"eta", "candidates", "g", "round"})
    zero_init = True
    draws = True  # type: ignore[assignment]

    r: int = field(default=8, metadata={"help": "rank of the LoRA with as many parameters", "min": 1})
    rounds: int = field(default=20, metadata={"help": "how often entries are dropped and grown", "min": 1})
    rate: float = field(default=0.2, metadata={"help": "share dropped in the first rounds", "min": 0, "max": 1})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        k, width = self.r * sum(W.shape), W.numel() // (self.r * sum(W.shape))
        if not width:
            raise ValueError(f"spiel: r={self.r} is too large for this weight; choose r <= {W.numel() // sum(W.shape)}")
        phi, whole = torch.zeros(k, device=W.device), torch.zeros(k, dtype=torch.int32, device=W.device)
        eta = torch.arange(k, dtype=torch.int32, device=W.device) * width + torch.randint_like(whole, width)
        return {"phi": phi, "eta": eta, "candidates": whole - 1, "g": phi.clone(), "round": whole[:1].clone()}

    def delta(self, p: Params, W: Tensor) -> Tensor:
        return p["phi"].new_zeros(W.numel()).index_add(0, p["eta"], p["phi"]).view(W.shape)

    def apply(self, p: Params, p0: Params | None, x: Tensor, base: Base, drop: Drop = keep) -> Tensor:
        linear = None if drop.p else ops.plain_linear(base, x)
        W = torch.empty(len(p["phi"]) // self.r - x.shape[-1], x.shape[-1], device="meta")

        def build(phi: Tensor) -> tuple[Tensor]:
            return (ops.watched(self.s * self.delta({**p, "phi": phi}, W), lambda slope: self.look(p, slope)),)

        change = ops.dense(drop(x), linear, ops.Rows(build), p["phi"])
        return base(x) + change if linear is None else change

    def look(self, p: Params, slope: Tensor) -> None:
        """Sum up the gradient of the candidates, if it is finite, after choosing them from the first one of a round."""
        if (now := self.place.t * self.rounds + 1e-6) % 1 < 0.25 and now < p["round"] + 0.25 and ops.all_finite(slope):
            if p["candidates"][0] < 0:
                p["candidates"].copy_(ops.of_the_first(slope.flatten().abs().topk(len(p["g"])).indices))
            p["g"] += ops.mean_of_all(slope.flatten()[p["candidates"]])

    def restart(self, p: Params, t: float) -> dict[str, Tensor | None]:
        phi, eta = p["phi"], p["eta"]
        candidates, done = p["candidates"], int(p["round"])
        if (now := self.place.t * self.rounds + 1e-6) < done + 0.25 or candidates[0] < 0:  # before the last pass
            return {}
        small, rest = phi.abs().argsort().tensor_split([int((self.rate * (1 - t) if done else 1) * len(phi))])
        free = ~torch.isin(candidates, eta[rest])
        grown = candidates[free][p["g"][free].abs().argsort(descending=True)[: len(small)]]
        enter = grown[~torch.isin(grown, eta[small])]
        new = small[~torch.isin(eta[small], grown)][: len(enter)]
        eta[new], phi[new] = enter, 0.0
        for state, value in ((candidates, -1), (p["g"], 0), (p["round"], max(done + 1, int(now)))):
            state.fill_(value)
        return {"phi": torch.zeros_like(phi, dtype=torch.bool).index_fill(0, new, True)}
