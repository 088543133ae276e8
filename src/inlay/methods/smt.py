"""SMT trains the blocks of the weight on which the gradient is largest; all others stay fixed.

    ΔW[rows_b, cols_b] = D_b,   D (blocks × r × r) = 0 at the blocks with the largest mean |gradient|

He et al. 2024, "Sparse Matrix Tuning", arXiv 2405.15525. The gradient is seen in a calibration pass before training
(the paper: 100 steps of warm-up), streamed to one score per block; the paper's r is 256. `blocks` is that of one
weight, by default with as many parameters as a LoRA of rank 8 [ours]; `allocate: blocks` distributes a budget over the
whole model, as the paper does. Of x only the columns that blocks read are kept for the backward pass, in a copy, and
only the blocks' gradient is formed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import Base, Drop, Method, Params, check_seen, keep
from inlay.methods.bat import check_blocks
from inlay.numerics import ops


@dataclass(frozen=True, kw_only=True)
class SMT(Method):
    name = "smt"
    title = "SMT: the blocks with the largest gradient"
    equation = "ΔW[rows_b, cols_b] = D_b"
    paper = "He et al. 2024, arXiv 2405.15525"
    trains = "D (blocks × r × r)"
    size = "r"
    frozen = frozenset({"rows", "cols"})
    zero_init = True
    needs = "gradients"

    r: int = field(default=32, metadata={"help": "size of a block; must divide both sides of the weight", "min": 1})
    blocks: int | None = field(default=None, metadata={"help": "per weight (default: a LoRA's of rank 8)", "min": 0})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_blocks(self, self.r, W)
        most, n = W.numel() // self.r**2, self.blocks
        if n is None:
            n = min(most, max(1, round(8 * sum(W.shape) / self.r**2)))
        if n > most:
            raise ValueError(f"smt: blocks={n} is more than the {most} of size {self.r} that a weight has")
        D = torch.zeros(n, self.r, self.r, device=W.device)
        if W.is_meta:
            where = torch.zeros(n, dtype=torch.int32, device=W.device)
        else:
            where = check_seen(self, stats)["score"].flatten().topk(n).indices.sort().values.int().to(W.device)
        across = W.shape[1] // self.r
        return {"D": D, "rows": where // across, "cols": where % across}

    def statistic(self, seen: Tensor) -> Params:
        """Return the mean |gradient| of each block, (out/r × in/r)."""
        return {"score": seen.abs().unflatten(1, (-1, self.r)).unflatten(0, (-1, self.r)).mean((1, 3))}

    def delta(self, p: Params, W: Tensor) -> Tensor:
        down, across = (side // self.r for side in W.shape)
        blocks = p["D"].new_zeros(down * across, self.r, self.r).index_add(0, p["rows"] * across + p["cols"], p["D"])
        return blocks.unflatten(0, (down, across)).transpose(1, 2).flatten(2).flatten(0, 1)

    def apply(self, p: Params, p0: Params | None, x: Tensor, base: Base, drop: Drop = keep) -> Tensor:
        linear = None if drop.p else ops.plain_linear(base, x)
        blocks = (self.s * p["D"], p["rows"], p["cols"])
        if linear is not None:
            return ops.blocks(drop(x), linear, *blocks, len(linear[0]))
        y = base(x)
        return y + ops.blocks(drop(x), None, *blocks, y.shape[-1])
