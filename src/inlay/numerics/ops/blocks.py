"""Apply changes ΔW that are zero outside some square blocks."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.numerics.ops.shared import (
    Linear,
    differentiable_gradients,
    own_precision,
    product_dtype,
    takes_reference,
)


def blocks(x: Tensor, linear: Linear | None, D: Tensor, rows: Tensor, cols: Tensor, out: int) -> Tensor:
    """Return x Wᵀ + bias + x ΔWᵀ, (..., out), where block (rows[b], cols[b]) of ΔW is D[b] and the rest is 0.

    D is (n × r × r). Of x the n columns of blocks that are read are kept, in a copy, or x where they are no fewer.
    """
    if takes_reference():
        return blocks_reference(x, linear, D, rows, cols, out)
    y = _Blocks.apply(x, *(linear or (None, None)), D, rows, cols, out)
    return y[0] if isinstance(y, tuple) else y


def blocks_reference(x: Tensor, linear: Linear | None, D: Tensor, rows: Tensor, cols: Tensor, out: int) -> Tensor:
    """Return what `blocks` computes."""
    t = torch.einsum("...np,nqp->...nq", x.unflatten(-1, (-1, D.shape[1]))[..., cols, :], D.to(x.dtype))
    change = t.new_zeros(*t.shape[:-2], out // D.shape[1], D.shape[1]).index_add(t.dim() - 2, rows, t).flatten(-2)
    return change if linear is None else F.linear(x, *linear) + change


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, W: Tensor | None, bias: Tensor | None, D: Tensor, rows: Tensor, cols: Tensor, out: int
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, and what is kept of x where it is a part: as an output, it still leads to x for derivatives."""
        dtype, (n, r, _) = product_dtype(x), D.shape
        ctx.shape, ctx.dtype = x.shape, x.dtype
        with own_precision(x.device.type):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            read = pick(flat, cols, r)
            y = flat.new_zeros(len(flat), out) if W is None else F.linear(flat, W, bias)
            y.unflatten(1, (-1, r)).index_add_(1, rows, (read @ D.to(dtype).mT).transpose(0, 1))
        narrow = n * r < flat.shape[1]
        kept = (read if narrow else x) if ctx.needs_input_grad[3] else None
        ctx.narrow, ctx.out = narrow, out
        ctx.save_for_backward(kept, W, D, rows, cols)
        ctx.set_materialize_grads(False)
        y = y.view(*x.shape[:-1], out)
        return (y, read) if kept is read else y

    @staticmethod
    def backward(ctx, g: Tensor | None, on_read: Tensor | None = None):  # type: ignore[override]
        if g is None and on_read is None:
            return (None,) * len(ctx.needs_input_grad)
        kept, W, D, rows, cols = ctx.saved_tensors
        r, inp = D.shape[1], ctx.shape[-1]
        if torch.is_grad_enabled() or g is None or on_read is not None:
            dx, dD = _Blocks.backward_with_graph(ctx, g, on_read, kept, W, D, rows, cols)
            return dx, None, None, dD, None, None, None
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

    @staticmethod
    def backward_with_graph(
        ctx,
        g: Tensor | None,
        on_read: Tensor | None,
        kept: Tensor | None,
        W: Tensor | None,
        D: Tensor,
        rows: Tensor,
        cols: Tensor,
    ) -> list[Tensor | None]:
        """Return the gradients of x and D as functions that can be differentiated again.

        g is the gradient of y, if there is one; on_read that of the blocks of x that were read, of which only a second
        derivative makes use. The other arguments are what the forward pass kept.
        """
        needs = ctx.needs_input_grad
        r = D.shape[1]
        dtype = cast(Tensor, on_read if g is None else g).dtype
        flat = (math.prod(ctx.shape[:-1]), ctx.out)
        g = D.new_zeros(flat, dtype=dtype) if g is None else g.reshape(flat)
        linear = None if W is None else (W, None)

        def product(x: Tensor, D: Tensor) -> Tensor:
            return blocks_reference(x.reshape(-1, x.shape[-1]).to(dtype), linear, D, rows, cols, ctx.out)

        if kept is not None and not ctx.narrow:
            return differentiable_gradients(product, [kept, D], [needs[0], needs[3]], g)
        with torch.enable_grad():
            dx, blank = None, torch.zeros(ctx.shape, dtype=ctx.dtype, device=g.device, requires_grad=True)
            if needs[0]:
                dx = differentiable_gradients(product, [blank, D], [True, False], g)[0]
            if needs[0] and on_read is not None:
                reads = lambda x: pick(x.reshape(-1, x.shape[-1]).to(dtype), cols, r)  # noqa: E731
                dx = cast(Tensor, dx) + cast(Tensor, differentiable_gradients(reads, [blank], [True], on_read)[0])
            dD = None if kept is None else (pick(g, rows, r).mT @ kept.to(dtype)).to(D.dtype)
        return [dx, dD]


def pick(x: Tensor, which: Tensor, r: int) -> Tensor:
    """Return blocks of r columns of x (T × in), in a copy (n × T × r): a view would keep all of x alive."""
    return x.unflatten(1, (-1, r)).transpose(0, 1)[which].contiguous()
