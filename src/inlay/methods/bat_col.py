"""Bat, by columns of blocks, lets the weight guide its own update: one r × r block per block of outputs.

    W'_ab = W_ab (I + B_a) + B_a,   B (out/r × r × r) = 0

Kang 2024, arXiv 2409.15371 v1-v3; this is the orientation of PEFT's `bat` and of the paper's figures (87.0M parameters
on LLaMA-2-7B). It is another family than `bat` (checkpoints are not interchangeable) and has no cheap form: ΔW is built
and applied a few block rows at a time, so a dense W' never exists. Prefer `bat` unless you repeat the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import Base, Method, Params
from inlay.methods.bat import check_blocks
from inlay.numerics import ops


@dataclass(frozen=True, kw_only=True)
class BatCol(Method):
    name = "bat_col"
    title = "Bat in PEFT's orientation: a block per output block"
    equation = "ΔW_ab = W_ab B_a + B_a"
    paper = "Kang 2024, arXiv 2409.15371 v1-v3"
    trains = "B (out/r × r × r)"
    size = "r"
    zero_init = True
    reads_weight = True

    r: int = field(default=8, metadata={"help": "block size; must divide both sides of the weight", "min": 1})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_blocks(self, self.r, W)
        return {"B": torch.zeros(W.shape[0] // self.r, self.r, self.r, device=W.device)}

    def delta(self, p: Params, W: Tensor) -> Tensor:
        return ops.bat_col_delta(W, p["B"])

    def rows(self, p: Params, p0: Params | None, base: Base) -> ops.Rows:
        r = self.r
        return ops.Rows(
            lambda B: (self.s * B, base.weight),
            lambda i, j, B, W: ops.bat_col_delta(W[i:j], B[i // r : j // r]),
            out=len(p["B"]) * r,
            step=r,
        )
