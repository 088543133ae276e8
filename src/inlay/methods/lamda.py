"""LaMDA trains a small square core between two projections; one is frozen, the other freezes block by block.

    ΔW = B S A,   A (r × in) frozen,   S (r × r) trained,   B (out × r) trained at first, frozen in blocks of columns

Azizi, Kundu, Pedram 2024, "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", arXiv
2406.12832. The start is open there, and [ours]: `init="svd"`, A = √(Σ_r/s) V_rᵀ, S = I, B = U_r √(Σ_r/s), offset;
`"svd_core"`, A = V_rᵀ, S = Σ_r/s, B = U_r ("svd" of older adapters); `"svd_zero"`, S = 0 there; `"kaiming"`, the code's
start, s = 16/r, the only one for weight decay. After a fraction t of the steps ⌊r t/eta⌋ columns of B are frozen.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
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

    init: Literal["svd", "svd_core", "svd_zero", "kaiming"] = field(
        default="svd",
        metadata={"help": "start", "choices": ("svd", "svd_core", "svd_zero", "kaiming"), "draws": ("kaiming",)},
    )
    eta: float = field(default=0.3, metadata={"help": "share of the steps in which B freezes", "above": 0, "max": 1})
    stages: int = field(default=8, metadata={"help": "blocks in which B freezes (at most r)", "min": 1})
    freeze_order: Literal["largest", "smallest"] = field(
        default="largest", metadata={"help": "which columns freeze first", "choices": ("largest", "smallest")}
    )

    @property
    def zero_init(self) -> bool:  # type: ignore[override]
        return self.init in ("svd_zero", "kaiming")

    @property
    def factor(self) -> float:
        return self.scale or (16 / self.r if self.init == "kaiming" else 1.0)

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, r := self.r, W)
        if self.init == "kaiming":
            B, S, A = (torch.zeros(shape, device=W.device) for shape in ((W.shape[0], r), (r, r), (r, W.shape[1])))
            S, A = (torch.nn.init.kaiming_uniform_(t, a=5**0.5) for t in (S, A))
        else:
            B, sigma, A = linalg.top_svd(W, self.r)
            sigma, share = sigma / self.s, {"svd": 0.5}.get(self.init, 0.0)  # the share of Σ in A, and in B
            S = torch.diag(0 * sigma if self.init == "svd_zero" else sigma ** (1 - 2 * share))
            A, B = sigma[:, None] ** share * A, B * sigma**share
        blocks = B.tensor_split(min(self.stages, r), 1)
        return {"A": A, "S": S} | {f"B_{i}": block.clone() for i, block in enumerate(blocks, 1)}

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
