"""Apply changes ΔW that are zero outside some square blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.numerics.ops.shared import Linear, own_precision, product_dtype


def blocks(x: Tensor, linear: Linear | None, D: Tensor, rows: Tensor, cols: Tensor, out: int) -> Tensor:
    """Return x Wᵀ + bias + x ΔWᵀ, (..., out), where block (rows[b], cols[b]) of ΔW is D[b] and the rest is 0.

    D is (n × r × r). Of x the n columns of blocks that are read are kept, in a copy, or x where they are no fewer.
    """
    if torch.compiler.is_compiling():
        return blocks_reference(x, linear, D, rows, cols, out)
    return _Blocks.apply(x, *(linear or (None, None)), D, rows, cols, out)


def blocks_reference(x: Tensor, linear: Linear | None, D: Tensor, rows: Tensor, cols: Tensor, out: int) -> Tensor:
    """Return what `blocks` computes."""
    t = torch.einsum("...np,nqp->...nq", x.unflatten(-1, (-1, D.shape[1]))[..., cols, :], D.to(x.dtype))
    change = t.new_zeros(*t.shape[:-2], out // D.shape[1], D.shape[1]).index_add(t.dim() - 2, rows, t).flatten(-2)
    return change if linear is None else F.linear(x, *linear) + change


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, W: Tensor | None, bias: Tensor | None, D: Tensor, rows: Tensor, cols: Tensor, out: int
    ) -> Tensor:
        dtype, (n, r, _) = product_dtype(x), D.shape
        ctx.shape, ctx.dtype = x.shape, x.dtype
        with own_precision(x.device.type):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            read = pick(flat, cols, r)
            y = flat.new_zeros(len(flat), out) if W is None else F.linear(flat, W, bias)
            y.unflatten(1, (-1, r)).index_add_(1, rows, (read @ D.to(dtype).mT).transpose(0, 1))
        narrow = n * r < flat.shape[1]
        kept = (read if narrow else x) if ctx.needs_input_grad[3] else None
        ctx.narrow = narrow
        ctx.save_for_backward(kept, W, D, rows, cols)
        return y.view(*x.shape[:-1], out)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        kept, W, D, rows, cols = ctx.saved_tensors
        r, inp = D.shape[1], ctx.shape[-1]
        g = g.reshape(-1, g.shape[-1])
        dx = dD = None
        with own_precision(g.device.type):
            written = pick(g, rows, r)
            if kept is not None:
                read = kept if ctx.narrow else pick(kept.reshape(-1, inp).to(g.dtype), cols, r)
                dD = (written.mT @ read).to(D.dtype)
            if ctx.needs_input_grad[0]:
                dx = g.new_zeros(len(g), inp) if W is None else g @ W
                dx.unflatten(1, (-1, r)).index_add_(1, cols, (written @ D.to(g.dtype)).transpose(0, 1))
        return None if dx is None else dx.view(ctx.shape).to(ctx.dtype), None, None, dD, None, None, None


def pick(x: Tensor, which: Tensor, r: int) -> Tensor:
    """Return blocks of r columns of x (T × in), in a copy (n × T × r): a view would keep all of x alive."""
    return x.unflatten(1, (-1, r)).transpose(0, 1)[which].contiguous()
