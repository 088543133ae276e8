"""LaMDA trains a small square core between two projections; one is frozen, the other freezes block by block.

    ΔW = B S A,   A (r × in) frozen,   S (r × r) trained,   B (out × r) trained at first, frozen in blocks of columns

Azizi, Kundu, Pedram 2024, arXiv 2406.12832 (in rows: Y = X W + α X A S B). After a share `eta` of the steps only the r²
entries of S are trained. The paper leaves open, and [ours] is: `init="svd"`, A = V_rᵀ, S = Σ_r / s, B = U_r in the
offset form; `"svd_zero"`, S = 0, where B moves only after S has. `"kaiming"` is the published code's start, with its s
= 16 / r. That code forgot a factor r: it freezes at most 3 of 64 columns, and weight decay moves those. [ours] is the
evident intention: after a fraction t of the steps, ⌊r t / eta⌋ columns, down to a border of the `stages` blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank, like
from inlay.numerics import linalg, ops


@dataclass(frozen=True, kw_only=True)
class LaMDA(LowRank):
    name = "lamda"
    title = "LaMDA: a square core between singular vectors"
    equation = "ΔW = B S A"
    paper = "Azizi et al. 2024, arXiv 2406.12832"
    trains = "S (r × r); B (out × r) until frozen"
    frozen = frozenset({"A"})

    init: Literal["svd", "svd_zero", "kaiming"] = field(
        default="svd", metadata={"help": "start", "choices": ("svd", "svd_zero", "kaiming"), "draws": ("kaiming",)}
    )
    eta: float = field(default=0.3, metadata={"help": "share of the steps in which B freezes", "above": 0, "max": 1})
    stages: int = field(default=8, metadata={"help": "blocks in which B freezes (at most r)", "min": 1})
    freeze_order: Literal["largest", "smallest"] = field(
        default="largest", metadata={"help": "which columns freeze first", "choices": ("largest", "smallest")}
    )

    @property
    def zero_init(self) -> bool:  # type: ignore[override]
        return self.init != "svd"

    @property
    def factor(self) -> float:
        return self.scale or (16 / self.r if self.init == "kaiming" else 1.0)

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        if self.init == "kaiming":
            draw = partial(torch.nn.init.kaiming_uniform_, a=5**0.5)
            S, A = (draw(torch.empty(self.r, n, device=W.device)) for n in (self.r, W.shape[1]))
            B = torch.zeros(W.shape[0], self.r, device=W.device)
        else:
            B, sigma, A = linalg.top_svd(W, self.r)
            S = torch.diag(sigma / self.s if self.init == "svd" else 0 * sigma)
        blocks = B.tensor_split(min(self.stages, self.r), 1)
        return {"A": A, "S": S, **{f"B_{i}": block.clone() for i, block in enumerate(blocks, 1)}}

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        return self.pair(p, None, W)

    def pair(self, p: Params, p0: Params | None, W: Tensor) -> tuple[Tensor, Tensor]:
        core, values = self.written(p, None if p0 is None else like(p0, p))
        return replace(core, s=1.0)(*values)

    def written(self, p: Params, p0: Params | None) -> tuple[ops.Core, tuple[Tensor, ...]]:
        B, B0 = ([q[k] for k in q if k.startswith("B")] for q in (p, p0 or {}))
        return ops.Core(self.s, (p0["S"], *B0) if p0 else ()), (p["A"], p["S"], *B)

    def schedule(self, p: Params, t: float) -> frozenset[str]:
        names = [k for k in p if k.startswith("B")]
        names = names[::-1] if self.freeze_order == "smallest" and self.init != "kaiming" else names
        ends = itertools.accumulate(p[k].shape[1] for k in names)
        return frozenset(k for k, end in zip(names, ends, strict=True) if end <= self.r * t / self.eta + 1e-9)
