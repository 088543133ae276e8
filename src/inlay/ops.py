"""Autograd functions that keep as little for the backward pass as the mathematics allows, each with its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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


def plain(base: Any, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The (W, bias) of a base that is nothing but a frozen nn.Linear in x's dtype, for products that join with its own.

    None where that cannot be told or done: a quantised base, hooks, a trained weight, autocast, a graph being compiled.
    """
    found = None if torch.compiler.is_compiling() else getattr(base, "linear", None)
    fits = found is not None and found[0].dtype == x.dtype and found[0].device == x.device
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return found if fits and not autocast else None


def wide(base: Any, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """As `plain`, where W + ΔW may be summed before the product: in fp32 and wider; bf16 would round ΔW away."""
    return plain(base, x) if x.dtype in (torch.float32, torch.float64) else None


def low_rank(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    build: Callable[..., tuple[Tensor, Tensor | None]],
    trains_A: bool,
    *p: Tensor,
) -> Tensor:
    """x Wᵀ + bias + (x Aᵀ) Bᵀ, (..., out), for (B, A) = build(*p); differentiable in x and p, W and bias are frozen.

    The small products are added into the large ones, forward and backward, so that no second tensor of the size of y
    or of x is written and read again. p and x Aᵀ, r wide, are kept, x only if `trains_A`. An A of None stands for
    [I I ... I] (r × in): x Aᵀ is then the sum of x's blocks.
    """
    return _LowRank.apply(x, W, bias, build, trains_A, *p)


def low_rank_reference(x: Tensor, W: Tensor, bias: Tensor | None, B: Tensor, A: Tensor | None) -> Tensor:
    """What `low_rank` computes."""
    u = block_sum(x, B.shape[1]) if A is None else F.linear(x, A.to(x.dtype))
    return F.linear(x, W, bias) + F.linear(u.to(x.dtype), B.to(x.dtype))


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None, build: Callable, trains_A: bool, *p: Tensor) -> Tensor:
        with _own_precision(x.device.type):
            B, A = build(*p)
        A = tiles(B.shape[1], x) if A is None and x.element_size() < 4 else A
        u = (block_sum(x, B.shape[1]) if A is None else F.linear(x, A.to(x.dtype))).to(x.dtype)
        y = F.linear(x, W, bias)
        y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), B.to(x.dtype).T)
        ctx.build, ctx.shape = build, x.shape
        ctx.save_for_backward(x if trains_A and A is not None and any(ctx.needs_input_grad[5:]) else None, u, W, *p)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, u, W, *p = ctx.saved_tensors
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        with torch.enable_grad(), _own_precision(g.device.type):
            leaves = [t.detach().requires_grad_(need) for t, need in zip(p, needs, strict=True)]
            B, A = ctx.build(*leaves)
        A = tiles(B.shape[1], W) if A is None and W.element_size() < 4 else A
        g, u, dx = g.reshape(-1, g.shape[-1]), u.reshape(-1, u.shape[-1]), None
        v = g @ B.detach().to(g.dtype)
        if need_x:
            dx = g @ W
            dx.addmm_(v, A.detach().to(g.dtype)) if A is not None else add_blocks(dx, v)
            dx = dx.view(ctx.shape)
        ends, slopes = [], []
        if B.requires_grad:
            ends, slopes = [B], [(g.T @ u).to(B.dtype)]
        if A is not None and A.requires_grad:
            ends, slopes = [*ends, A], [*slopes, (v.T @ x.reshape(-1, x.shape[-1])).to(A.dtype)]
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad(ends, trained, slopes) if trained else ())
        return dx, None, None, None, None, *(next(grads) if need else None for need in needs)


def tiles(r: int, x: Tensor) -> Tensor:
    """[I I ... I], (r × in), for an x of half precision: its units multiply faster than they add, and sum in fp32."""
    return torch.eye(r, dtype=x.dtype, device=x.device).repeat(1, -(-x.shape[-1] // r))[:, : x.shape[-1]]


def block_sum(x: Tensor, r: int) -> Tensor:
    """Σ_j x[..., jr : (j+1)r], (..., r), accumulated in at least fp32 with no copy of x; a last block may be short."""
    dtype, tail = torch.promote_types(x.dtype, torch.float32), x.shape[-1] % r
    S = x[..., : x.shape[-1] - tail].unflatten(-1, (-1, r)).sum(-2, dtype=dtype)
    return S + F.pad(x[..., x.shape[-1] - tail :], (0, r - tail)) if tail else S


def add_blocks(x: Tensor, v: Tensor) -> Tensor:
    """Add v (n × r) to every block of r columns of x (n × in), in place: the transpose of `block_sum`."""
    r, tail = v.shape[1], x.shape[1] % v.shape[1]
    x[:, : x.shape[1] - tail].unflatten(1, (-1, r)).add_(v[:, None])
    x[:, x.shape[1] - tail :].add_(v[:, :tail]) if tail else None
    return x


def dense(x: Tensor, W: Tensor, bias: Tensor | None, build: Callable[..., Tensor], *p: Tensor) -> Tensor:
    """x (W + D)ᵀ + bias, (..., out), for D = build(*p), in one product; differentiable in x and p.

    Three products of the size of a layer in all (the floor of a dense update), where `product` beside the base makes
    five. For fp32 and wider: a sum in bf16 would round a small D away.
    """
    return _Dense.apply(x, W, bias, build, *p)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None, build: Callable[..., Tensor], *p: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, *p)
        ctx.build = build
        return F.linear(x, build(*p).to(x.dtype).add_(W), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, W, *p = ctx.saved_tensors
        leaves = [t.detach().requires_grad_(need) for t, need in zip(p, ctx.needs_input_grad[4:], strict=True)]
        with torch.enable_grad():
            D = ctx.build(*leaves)
        g = g.reshape(-1, g.shape[-1])
        dx = (g @ (D.detach() + W)).view(x.shape) if ctx.needs_input_grad[0] else None
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(())
        if trained:
            grads = iter(torch.autograd.grad(D, trained, (g.T @ x.reshape(-1, x.shape[-1])).to(D.dtype)))
        return dx, None, None, None, *(next(grads) if need else None for need in ctx.needs_input_grad[4:])


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
