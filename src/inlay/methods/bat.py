"""Bat, by rows of blocks, lets the weight guide its own update: one r × r block per block of inputs.

    W'_ab = W_ab (I + B_b) + B_b,   B (in/r × r × r) = 0

Kang 2024, arXiv 2409.15371 v1-v3 (there called Bone); this orientation is RWKV-PEFT's. `bat_col` is the other one. The
fast form is exact and in neither paper nor code [ours]: with t = blockdiag(B) x,

    y = W (x + s t) + s tile(Σ_b t_b)

so the base, quantised or not, is called once, on x + s t, and no dense W' exists; in bf16 that sum is rounded like any
activation. ΔW depends on W: two active Bats do not commute (each depends on the weight below it), and unmerging
restores a saved copy instead of inverting I + B.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import Base, Drop, Method, Params, keep
from inlay.numerics import ops


@dataclass(frozen=True, kw_only=True)
class Bat(Method):
    name = "bat"
    title = "Bat: the weight guides its update, a block per input block"
    equation = "ΔW_ab = W_ab B_b + B_b"
    paper = "Kang 2024, arXiv 2409.15371 v1-v3"
    trains = "B (in/r × r × r)"
    size = "r"
    zero_init = True
    reads_weight = True

    r: int = field(default=8, metadata={"help": "block size; must divide both sides of the weight", "min": 1})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_blocks(self, self.r, W)
        return {"B": torch.zeros(W.shape[1] // self.r, self.r, self.r, device=W.device)}

    def delta(self, p: Params, W: Tensor) -> Tensor:
        B, r = p["B"], self.r
        blocks = W.to(B.dtype).unflatten(1, (-1, r)).unflatten(0, (-1, r))  # (a, i, b, p)
        return (torch.einsum("aibp,bpq->aibq", blocks, B) + B.transpose(0, 1)).flatten(2).flatten(0, 1)

    def apply(self, p: Params, p0: Params | None, x: Tensor, base: Base, drop: Drop = keep) -> Tensor:
        B = p["B"] if self.s == 1 else self.s * p["B"]
        if not drop.p and (linear := ops.plain_linear(base, x)) is not None:
            return ops.bat(x, linear, B)
        return ops.bat_reference(x, base, B, drop)


def check_blocks(method: Method, r: int, W: Tensor) -> None:
    """Raise a ValueError that names the usable sizes unless r × r blocks tile W."""
    out, inp = W.shape
    if out % r or inp % r:
        allowed = [d for d in range(1, min(out, inp) + 1) if out % d == 0 and inp % d == 0]
        raise ValueError(f"{method.name}: r={r} does not divide both sides of the {out} × {inp} weight; use {allowed}")
