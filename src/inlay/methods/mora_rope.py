"""MoRA with rotations trains one square matrix for every block of the input, each block turned first (type 6).

    y = W x + s tile([M R_0 x_0; M R_1 x_1; ...]),   x_j = x[jk : (j+1)k],   M (k × k) = 0,   k = round(√((out + in) r))
    R_j turns the pairs (x_j[p], x_j[p + k/2]) by the angle j 10000^(−2p/k), as RoPE does

Jiang et al. 2024, arXiv 2405.12130, eq. 9: without R_j equal blocks would be treated alike. k is even; x is filled up
as in `mora`. ΔW is block-diagonal, truncated or tiled to the outputs, and of full rank: merging is exact, a LoRA of it
is not. M R_j is built, in × k entries, rather than R_j x_j, so that x is kept by reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.method import Base, Drop, Method, Params, keep
from inlay.methods.mora import square, tile


@dataclass(frozen=True, kw_only=True)
class MoRARope(Method):
    name = "mora_rope"
    title = "MoRA with rotations: a square matrix for every turned block"
    equation = "ΔW = diag(M R_0, M R_1, ...), cut or tiled to the outputs"
    paper = "Jiang et al. 2024, arXiv 2405.12130, type 6"
    trains = "M (k × k), k = √((out + in) r), even"
    size = "r"
    zero_init = True

    r: int = field(default=8, metadata={"help": "rank of the LoRA with as many parameters", "min": 1})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        return {"M": square(self, self.r, W, even=True)}

    def delta(self, p: Params, W: Tensor) -> Tensor:
        out, inp = W.shape
        D = torch.block_diag(*turned(p["M"], inp))
        short = D.shape[1] - inp
        return tile((D[:, :inp] + F.pad(D[:, inp:], (0, inp - short))).T, out).T

    def apply(self, p: Params, p0: Params | None, x: Tensor, base: Base, drop: Drop = keep) -> Tensor:
        y, z = base(x), drop(x)
        k = len(p["M"])
        blocks, tail = turned(self.s * p["M"], x.shape[-1]).to(x.dtype), x.shape[-1] % k
        whole = z[..., : x.shape[-1] - tail].unflatten(-1, (-1, k))
        t = torch.einsum("...jp,jqp->...jq", whole, blocks[: whole.shape[-2]]).flatten(-2)
        if tail:
            last = F.linear(torch.cat([z[..., -tail:], z[..., : k - tail]], -1), blocks[-1])
            t = torch.cat([t, last.to(t.dtype)], -1)
        return y + tile(t, y.shape[-1])


def turned(M: Tensor, inp: int) -> Tensor:
    """Return M R_j for every block of an input, (⌈in / k⌉ × k × k)."""
    k, dtype = len(M), torch.promote_types(M.dtype, torch.float32)
    j, p = (torch.arange(n, dtype=dtype, device=M.device) for n in (-(-inp // k), k // 2))
    angle = torch.outer(j, 10000 ** (-2 * p / k)).repeat(1, 2)[:, None]
    left, right = M.chunk(2, 1)
    return (M * angle.cos() + torch.cat([right, -left], 1) * angle.sin()).to(M.dtype)
