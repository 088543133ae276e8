"""MoRA trains one square matrix between a folded input and a tiled output (the paper's type 1, sharing).

    y = W x + s tile(M Σ_j x[jk : (j+1)k]),   M (k × k) = 0,   k = round(√((out + in) r))
    that is   ΔW[o, c] = M[o mod k, c mod k], and the same again for c + in where that is below k ⌈in / k⌉

Jiang et al. 2024, "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning", arXiv 2405.12130, eq. 6. M has as
many parameters as a LoRA of rank r, and rank k. Where k does not divide `in`, the published code fills x up with its
own beginning, and so does this one. Only k numbers per token are kept for the backward pass; the export is a LoRA of
rank k. The paper recommends this for large r, `mora_rope` for small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.method import Base, Drop, LowRank, Method, Params, keep
from inlay.numerics import ops


@dataclass(frozen=True, kw_only=True)
class MoRA(LowRank):
    name = "mora"
    title = "MoRA: a square matrix, shared by all blocks of the weight"
    equation = "ΔW = [I I ... I]ᵀ M [I I ... I]"
    paper = "Jiang et al. 2024, arXiv 2405.12130, type 1"
    trains = "M (k × k), k = √((out + in) r)"
    zero_init = True
    roles = {}

    r: int = field(default=8, metadata={"help": "rank of the LoRA with as many parameters", "min": 1})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        return {"M": square(self, self.r, W)}

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        eye, inp = torch.eye(len(p["M"]), dtype=p["M"].dtype, device=p["M"].device), W.shape[1]
        short = -inp % len(eye)
        A = tile(eye, inp + short)
        return tile(p["M"].T, W.shape[0]).T, A[:, :inp] + F.pad(A[:, inp:], (0, inp - short))

    def apply(self, p: Params, p0: Params | None, x: Tensor, base: Base, drop: Drop = keep) -> Tensor:
        y, k = base(x), len(p["M"])
        S = ops.block_sum(x, k)
        if tail := x.shape[-1] % k:
            S = S + F.pad(x[..., : k - tail], (tail, 0))
        return y + tile(F.linear(drop(S.to(x.dtype)), (self.s * p["M"]).to(x.dtype)), y.shape[-1])


def square(method: Method, r: int, W: Tensor, even: bool = False) -> Tensor:
    """Return M = 0, (k × k); raise a ValueError where it does not fit into W."""
    k = int(math.sqrt(sum(W.shape) * r) + 0.5)
    k = max(2, k // 2 * 2) if even else k
    if k > min(W.shape):
        most = int((min(W.shape) + 0.5) ** 2 / sum(W.shape))
        raise ValueError(
            f"{method.name}: r={r} makes M {k} × {k}, more than the {W.shape[0]} × {W.shape[1]} weight holds; "
            f"choose r <= {most}"
        )
    return torch.zeros(k, k, device=W.device)


def tile(v: Tensor, width: int) -> Tensor:
    """Repeat v (..., k) up to (..., width)."""
    return v.repeat(*[1] * (v.dim() - 1), -(-width // v.shape[-1]))[..., :width]
