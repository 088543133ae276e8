"""Autograd functions that keep as little for the backward pass as the mathematics allows, each with its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SCRATCH = 1 << 20  # numbers of ΔW built at a time


def product(x: Tensor, build: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """x Dᵀ, (..., out), for a matrix D = build(*tensors), (out × in); differentiable in x and the tensors.

    Only x and the tensors are kept: the backward pass builds D again, and gᵀx lives for a moment. D is built in the
    tensors' own precision (autocast does not reach it) and rounded once, to the dtype of the product.
    """
    if torch.compiler.is_compiling():  # the compiler decides itself what to keep and what to compute twice
        return F.linear(x, build(*tensors).to(x.dtype))
    return _Product.apply(x, build, *tensors)


def _own_precision(device: str) -> AbstractContextManager:
    """Autocast off, on devices that have it (the meta device does not)."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, build: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.build = build
        with _own_precision(x.device.type):
            D = build(*tensors)
        return F.linear(x, D.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, *tensors = ctx.saved_tensors
        need_x, _, *needs = ctx.needs_input_grad
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        with torch.enable_grad(), _own_precision(x.device.type):
            D = ctx.build(*leaves)
        dx = (g @ D.detach().to(g.dtype)).to(x.dtype) if need_x else None
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(())
        if trained:
            dD = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(g.dtype)
            grads = iter(torch.autograd.grad(D, trained, dD.to(D.dtype)))
        return dx, None, *(next(grads) if need else None for need in needs)


def bat_col_delta(W: Tensor, B: Tensor) -> Tensor:
    """ΔW_ab = W_ab B_a + B_a for W (out × in) and B (out/r × r × r), in B's dtype. The reference of `bat_col`."""
    a, r, _ = B.shape
    blocks = W.to(B.dtype).reshape(a, -1, r) @ B
    return (blocks.unflatten(1, (r, -1)) + B[:, :, None]).flatten(2).flatten(0, 1)


def bat_col(x: Tensor, B: Tensor, W: Tensor, weight: Callable[[], Tensor]) -> Tensor:
    """x ΔWᵀ, (..., out), for `bat_col_delta`, a few block rows at a time; differentiable in x and B.

    Only x and B are kept; `weight` is called for W again in the backward pass, so that a quantised one is dequantised
    twice rather than held.
    """
    return _BatCol.apply(x, B, W, weight)


class _BatCol(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, B: Tensor, W: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(x, B)
        ctx.weight = weight
        y = x.new_empty(*x.shape[:-1], B.shape[0] * B.shape[1])
        for rows, Wa, Ba in _block_rows(W, B):
            y[..., rows] = x @ bat_col_delta(Wa, Ba).to(x.dtype).T
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, B = ctx.saved_tensors
        flat, g, r = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), B.shape[1]
        dx, dB = torch.zeros_like(flat), []
        for rows, W, Ba in _block_rows(ctx.weight(), B):
            if ctx.needs_input_grad[0]:
                dx.addmm_(g[:, rows], bat_col_delta(W, Ba).to(g.dtype))
            dD = (g[:, rows].T @ flat).to(B.dtype).view(len(Ba), -1, r)
            dB.append(W.to(B.dtype).reshape(len(Ba), -1, r).mT @ dD + dD.unflatten(1, (r, -1)).sum(2))
        return dx.view_as(x), torch.cat(dB), None, None


def _block_rows(W: Tensor, B: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Groups of block rows of W that fit the scratch size, with their blocks of B and their place in y."""
    r = B.shape[1]
    step = max(1, SCRATCH // (r * W.shape[1]))
    for a in range(0, len(B), step):
        rows = slice(a * r, min(a + step, len(B)) * r)
        yield rows, W[rows], B[a : a + step]
