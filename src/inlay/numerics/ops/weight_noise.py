"""Add Gaussian noise to a weight, rebuilt from its seed a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.numerics.ops import shared
from inlay.numerics.ops.shared import differentiable_gradients, own_precision, product_dtype


def weight_noise(x: Tensor, sigma: Tensor, seed: int) -> Tensor:
    """Return x Eᵀ, (..., out), with E[o] Gaussian of standard deviation sigma[o], (out × in).

    E is built from the seed, a few rows at a time, here and again for dx; only sigma is kept.
    """
    return _Noise.apply(x, sigma, seed)


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sigma: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(sigma)
        ctx.seed = seed
        ctx.shape, ctx.dtype = x.shape, x.dtype
        dtype = product_dtype(x)
        with own_precision(x.device.type):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            y = flat.new_empty(len(flat), len(sigma))
            for rows, E in gaussian_rows(sigma.to(dtype), x.shape[-1], seed):
                y[:, rows].addmm_(flat, E.T, beta=0)
        return y.view(*x.shape[:-1], len(sigma))

    @staticmethod
    def backward(ctx, g: Tensor):
        (sigma,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True; the product is linear in x
            x = torch.zeros(ctx.shape, dtype=ctx.dtype, device=g.device, requires_grad=True)
            E = torch.cat([rows for _, rows in gaussian_rows(sigma.to(g.dtype), ctx.shape[-1], ctx.seed)])
            return *differentiable_gradients(lambda x: F.linear(x.to(g.dtype), E), [x], [True], g), None, None
        with own_precision(g.device.type):
            g = g.reshape(-1, g.shape[-1])
            dx = g.new_zeros(len(g), ctx.shape[-1])
            for rows, E in gaussian_rows(sigma.to(g.dtype), ctx.shape[-1], ctx.seed):
                dx.addmm_(g[:, rows], E)
        return dx.view(ctx.shape).to(ctx.dtype), None, None


def gaussian_rows(sigma: Tensor, inp: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield Gaussian rows (out × in), row o of standard deviation sigma[o], in strips."""
    generator = torch.Generator(sigma.device).manual_seed(seed)
    height = max(1, shared.SCRATCH // inp)
    for i in range(0, len(sigma), height):
        rows = slice(i, min(i + height, len(sigma)))
        E = sigma.new_empty(rows.stop - i, inp).normal_(generator=generator)
        yield rows, E.mul_(sigma[rows, None])
