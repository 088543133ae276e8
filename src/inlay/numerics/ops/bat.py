"""Compute Bat's product: one block per block of inputs, around the layer's own product."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.numerics.ops import shared
from inlay.numerics.ops.dropout import Dropout, keep
from inlay.numerics.ops.shared import Linear, add_blocks, block_sum, differentiable_gradients, takes_reference, tiles


def bat(x: Tensor, linear: Linear, B: Tensor) -> Tensor:
    """Return W (x + t) + tile(Σ_b t_b) + bias, (..., out), with t = blockdiag(B) x; B (in/r × r × r).

    x and B are kept. Blocks are multiplied a few at once, as the diagonal of a larger one: an r × r product is too
    small to be fast.
    """
    if takes_reference():
        return bat_reference(x, lambda x: F.linear(x, *linear), B)
    return _Bat.apply(x, *linear, B)


def bat_reference(x: Tensor, base: Callable[[Tensor], Tensor], B: Tensor, drop: Dropout = keep) -> Tensor:
    """Return what `bat` computes, over any layer."""
    t = torch.einsum("...bp,bqp->...bq", drop(x).unflatten(-1, (-1, B.shape[1])), B.to(x.dtype))
    y = base(x + t.flatten(-2))
    total = t.sum(-2).to(y.dtype)  # which autocast sums in fp32
    return y + total.repeat(*[1] * (t.dim() - 2), y.shape[-1] // B.shape[1])


class _Bat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, B)
        flat, r = x.reshape(-1, x.shape[-1]), B.shape[1]
        E = diagonal(B.to(x.dtype))
        z, total = torch.empty_like(flat), flat.new_empty(len(flat), r)
        for rows in row_strips(flat):
            xs = flat[rows].unflatten(1, (len(E), -1))
            t = torch.bmm(xs.transpose(0, 1), E.mT)
            torch.add(xs, t.transpose(0, 1), out=z[rows].view_as(xs))
            total[rows] = block_sum(t.sum(0, dtype=torch.promote_types(t.dtype, torch.float32)), r)
        y = F.linear(z, W, bias)
        right = tiles(r, len(W), y)
        if right is None:
            add_blocks(y, total)
        else:
            y.addmm_(total, right)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, g: Tensor):
        x, W, B = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            function = lambda x, B: bat_reference(x, lambda x: F.linear(x, W), B)  # noqa: E731
            dx, dB = differentiable_gradients(function, [x, B], [ctx.needs_input_grad[0], ctx.needs_input_grad[3]], g)
            return dx, None, None, dB
        g, flat = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        r = B.shape[1]
        E = diagonal(B.to(x.dtype))
        dx, right = g @ W, tiles(r, len(W), g)
        total = (block_sum(g, r) if right is None else g @ right.T).to(g.dtype).repeat(1, E.shape[1] // r)
        dE = torch.zeros_like(E, dtype=B.dtype)
        for rows in row_strips(flat):
            zs = dx[rows].unflatten(1, (len(E), -1))
            t = (zs + total[rows, None]).transpose(0, 1)
            dE += t.mT @ flat[rows].view_as(zs).transpose(0, 1)
            zs += torch.bmm(t, E).transpose(0, 1)
        dB = dE.unflatten(2, (-1, r)).unflatten(1, (-1, r)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        return dx.view_as(x), None, None, dB.reshape(B.shape)


def row_strips(x: Tensor) -> Iterator[slice]:
    """Yield groups of rows that fit a CPU's cache; on a GPU all of them."""
    height = max(1, len(x) if x.is_cuda else (shared.SCRATCH >> 3) // x.shape[1])
    for i in range(0, len(x), height):
        yield slice(i, min(i + height, len(x)))


def diagonal(B: Tensor) -> Tensor:
    """Join blocks (n × r × r) to fewer, block-diagonal ones, (n/m × mr × mr)."""
    n, r, _ = B.shape
    m = next(m for m in range(max(1, (32 if B.element_size() >= 4 else 64) // r), 0, -1) if n % m == 0)
    E = B.new_zeros(n // m, m, r, m, r)
    E.diagonal(dim1=1, dim2=3).copy_(B.view(-1, m, r, r).permute(0, 2, 3, 1))
    return E.view(n // m, m * r, m * r)
