"""Compute x Wᵀ + (x Aᵀ) Bᵀ with as little kept for the backward pass as the mathematics allows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.numerics.ops.dropout import Dropout, keep, masks
from inlay.numerics.ops.savers import SAVERS
from inlay.numerics.ops.shared import (
    TWICE,
    Factors,
    Linear,
    add_blocks,
    block_sum,
    differentiable_gradients,
    holds_changes,
    leaves_of,
    own_precision,
    product_dtype,
    pull,
    takes_reference,
    tiles,
)


@dataclass(frozen=True)
class Pair:
    """Build s B A, or s ((B − B₀) A + B₀ (A − A₀)) as one product of (out × 2r) and (2r × in), from (A, B) or B alone.

    It is zero at the start in any order of products, and nothing large cancels. `start` is (A₀, B₀). Its gradients are
    written out: a graph of its own for them takes longer than a small layer does. Where it is `doubled`, twice as wide
    for the start, they are of the first half of A and of the sum of both halves of B.
    """

    s: float = 1.0
    start: tuple[Tensor, Tensor] | None = None

    def __call__(self, *p: Tensor) -> tuple[Tensor, Tensor | None]:
        *A, B = p
        if self.start is not None:
            A0, B0 = self.start
            A, B = [torch.cat([A[0], A[0] - A0])], torch.cat([B - B0, B0], 1)
        return times(self.s, B), A[0] if A else None

    @property
    def doubled(self) -> bool:
        return self.start is not None

    def pull(self, p: Sequence[Tensor], dB: Tensor | None, dA: Tensor | None) -> list[Tensor | None]:
        """Return the gradients of p from those of what was built, None for None."""
        dB = None if dB is None else times(self.s, dB)
        return [None if d is None else d.to(t.dtype) for d, t in zip((dA, dB)[-len(p) :], p, strict=True)]


@dataclass(frozen=True)
class Core:
    """Build s B S A, or s ((B − B₀) S + B₀ (S − S₀)) A, from a frozen A, S, and B in blocks of columns; see `Pair`.

    `start` is S₀ and the blocks of B₀.
    """

    s: float = 1.0
    start: Sequence[Tensor] = ()

    def __call__(self, A: Tensor, S: Tensor, *blocks: Tensor) -> tuple[Tensor, Tensor]:
        B = torch.cat(blocks, 1)
        if not self.start:
            return times(self.s, B @ S), A
        S0, B0 = self.start[0], torch.cat(list(self.start[1:]), 1)
        return times(self.s, torch.addmm(B0 @ (S - S0), B - B0, S)), A

    def pull(self, p: Sequence[Tensor], dB: Tensor | None, dA: Tensor | None) -> list[Tensor | None]:
        """Return the gradients as `Pair.pull` does: B S A has the slopes Bᵀ (dB) for S and (dB) Sᵀ for B."""
        _, S, *blocks = p
        if dB is None:
            return [None] * len(p)
        dB = times(self.s, dB.to(S.dtype))
        each: Any = torch.split_with_sizes_copy(dB @ S.T, [block.shape[1] for block in blocks], 1)
        return [None, torch.cat(blocks, 1).T @ dB, *each]


def times(s: float, t: Tensor) -> Tensor:
    return t if s == 1 else s * t


def low_rank(x: Tensor, linear: Linear | None, build: Factors, on_x: bool, drop: Dropout, *p: Tensor) -> Tensor:
    """Return x Wᵀ + bias + (x Aᵀ) Bᵀ, (..., out), for (B, A) = build(*p), which is called in both passes.

    p and x Aᵀ, r wide, are kept, and x if `on_x`, where A is trained. An A of None stands for [I I ... I] (r × in): x
    Aᵀ is then the sum of x's blocks. Dropout is on x if x is kept, else on x Aᵀ; its seed is kept, and no mask. With a
    saver in `drop` less than x is kept, and A's gradient is an estimate; nothing else is (nor if compiled). Where
    `sum_pays`, W + B A is built in both passes and multiplied. A `Pair` that is `doubled` gets the gradients of the
    halves it names.
    """
    if takes_reference():  # the compiler decides itself what to keep and what to compute twice
        return low_rank_reference(x, linear, *build(*p), drop, on_x)
    y = _LowRank.apply(x, *(linear or (None, None)), build, on_x, drop, *p)
    return y[0] if isinstance(y, tuple) else y


def low_rank_reference(
    x: Tensor, linear: Linear | None, B: Tensor, A: Tensor | None, drop: Dropout = keep, on_x: bool = True
) -> Tensor:
    """Return what `low_rank` computes."""
    if A is None:
        u = drop(block_sum(x, B.shape[1]))
    else:
        u = F.linear(drop(x), A.to(x.dtype)) if on_x else drop(F.linear(x, A.to(x.dtype)))
    y = F.linear(u.to(x.dtype), B.to(x.dtype))
    return y if linear is None else F.linear(x, *linear) + y


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, W: Tensor | None, bias: Tensor | None, build: Factors, on_x: bool, how: Dropout, *p: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, and u where x is not kept: as an output, what is saved of it still leads to x for derivatives."""
        dtype, drop = product_dtype(x), how.p
        ctx.saver = SAVERS.get(how.saver)
        ctx.build, ctx.drop = build, drop
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.seed = int(torch.randint(1 << 62, (), device="cpu")) if drop else 0
        with own_precision(x.device.type):
            flat, (B, A) = x.reshape(-1, x.shape[-1]).to(dtype), build(*p)
            ctx.on_x = on_x and A is not None
            doubled = isinstance(build, Pair) and build.doubled
            ctx.half = half = B.shape[1] // 2 if doubled else None
            ctx.joined = A is not None and not drop and W is not None and sum_pays(len(flat), W, doubled)
            B, A = B.to(dtype), tiles(B.shape[1], flat.shape[1], flat) if A is None else A.to(dtype)
            if ctx.joined:
                y = F.linear(flat, torch.addmm(cast(Tensor, W), B, cast(Tensor, A)), bias)
                u = flat @ cast(Tensor, A)[:half].T
            else:
                if drop and ctx.on_x:
                    u = flat.new_empty(len(flat), B.shape[1])
                    for rows, mask in masks(flat.shape, flat, drop, ctx.seed):
                        torch.mm(mask.mul_(flat[rows]), cast(Tensor, A).T, out=u[rows])
                else:
                    u = (block_sum(flat, B.shape[1]) if A is None else flat @ A.T).to(dtype)
                    if drop:
                        for rows, mask in masks(u.shape, u, drop, ctx.seed):
                            u[rows] *= mask
                y = u @ B.T if W is None else F.linear(flat, W, bias).addmm_(u, B.T)
                u = u if half is None else u[:, :half].clone()
            kept: tuple[Tensor | None, ...] = (x if ctx.on_x and any(ctx.needs_input_grad[6:]) else None,)
            if ctx.saver is not None and kept[0] is not None:
                kept = ctx.saver.keep(flat)
        ctx.kept, ctx.out = len(kept), y.shape[-1]
        ctx.save_for_backward(*kept, u, W, *p)
        ctx.set_materialize_grads(False)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return (y, u) if kept[0] is None else y

    @staticmethod
    def backward(ctx, g: Tensor | None, on_u: Tensor | None = None):  # type: ignore[override]
        if g is None and on_u is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # may be read only once
        kept, (u, W, *p) = saved[: ctx.kept], saved[ctx.kept :]
        x = kept[0]
        if torch.is_grad_enabled() or g is None or on_u is not None:
            dx, *grads = _LowRank.backward_with_graph(ctx, g, on_u, x, u, W, p)
            return dx, None, None, None, None, None, *grads
        g, inp = g.reshape(-1, g.shape[-1]), ctx.shape[-1]
        with own_precision(g.device.type):
            needs, written = ctx.needs_input_grad[6:], isinstance(ctx.build, Pair | Core)
            leaves = p if written else leaves_of(p, needs)
            with nullcontext() if written else torch.enable_grad():
                B, A = ctx.build(*leaves)
            if written:
                trains_A, trains_B = A is not None and needs[0], any(needs[0 if A is None else 1 :])
            else:
                trains_A, trains_B = A is not None and A.requires_grad, B.requires_grad
            trained = A if trains_A else None
            right: Any = tiles(B.shape[1], inp, g) if A is None else A.detach().to(g.dtype)
            flat = None if trained is None or ctx.saver else x.reshape(-1, inp).to(g.dtype)
            left = B.detach().to(g.dtype)
            dA = dx = None
            v: Any = None  # g B, which the sum avoids where A is frozen
            if ctx.joined:
                v = None if trained is None else g @ folded(left, ctx.half)
                if ctx.needs_input_grad[0]:
                    dx = g @ torch.addmm(W, left, right)
            else:
                v = g @ left
                if ctx.needs_input_grad[0]:
                    dx = g.new_zeros(len(g), inp) if W is None else g @ W
            if ctx.drop and ctx.on_x:
                w = folded(v, ctx.half)
                dA = None if trained is None else trained.new_zeros(w.shape[1], inp)
                for rows, mask in masks((len(g), inp), g, ctx.drop, ctx.seed):
                    if dx is not None:
                        dx[rows].addcmul_(v[rows] @ right, mask)
                    if dA is not None and flat is not None:
                        dA += w[rows].T @ mask.mul_(flat[rows])
            else:
                if ctx.drop:
                    for rows, mask in masks(v.shape, v, ctx.drop, ctx.seed):
                        v[rows] *= mask
                if dx is not None and not ctx.joined:
                    if right is None:
                        add_blocks(dx, v)
                    else:
                        dx.addmm_(v, right)
                if trained is not None:
                    w = v if ctx.joined else folded(v, ctx.half)
                    dA = w.T @ flat if flat is not None else cast(Any, ctx.saver).product(w, *kept)
            dB = (u.T @ g).T if trains_B else None
            grads = ctx.build.pull(p, dB, dA) if written else pull([(B, dB), (A, dA)], leaves)
        return None if dx is None else dx.view(ctx.shape).to(ctx.dtype), None, None, None, None, None, *grads

    @staticmethod
    def backward_with_graph(
        ctx, g: Tensor | None, on_u: Tensor | None, x: Tensor | None, u: Tensor, W: Tensor | None, p: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the gradients of x and `p` as functions that can be differentiated again.

        g is the gradient of y, if there is one; on_u that of u, of which only a second derivative makes use. The other
        arguments are what was kept; where x was not, the gradient of p needs no more than u, and that of x no x.

        Raises:
            RuntimeError: less than x was kept.
        """
        needs = ctx.needs_input_grad[6:]
        dtype = cast(Tensor, on_u if g is None else g).dtype
        g = u.new_zeros(len(u), ctx.out, dtype=dtype) if g is None else g.reshape(-1, ctx.out)
        if ctx.saver is not None and any(needs):
            raise RuntimeError(f"saver: what it keeps gives no second derivatives; {TWICE}")

        def inner(x: Tensor, A: Tensor | None, r: int) -> Tensor:
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            seen = flat * mask(flat) if ctx.on_x else flat
            inner = block_sum(seen, r).to(dtype) if A is None else F.linear(seen, A.to(dtype))
            return inner if ctx.on_x else inner * mask(inner)

        def mask(like: Tensor) -> Tensor | float:
            return torch.cat([m for _, m in masks(like.shape, like.detach(), ctx.drop, ctx.seed)]) if ctx.drop else 1.0

        def product(x: Tensor, *p: Tensor) -> Tensor:
            B, A = ctx.build(*p)
            y = F.linear(inner(x, A, B.shape[1]), B.to(dtype))
            return y if W is None else F.linear(x.reshape(-1, x.shape[-1]).to(dtype), W) + y

        def from_inner(u: Tensor, *p: Tensor) -> Tensor:
            return F.linear(u.to(dtype), ctx.build(*p)[0][:, : ctx.half].to(dtype))

        if x is not None:
            return differentiable_gradients(product, [x, *p], [ctx.needs_input_grad[0], *needs], g)
        with torch.enable_grad():
            dx, blank = None, torch.zeros(ctx.shape, dtype=ctx.dtype, device=g.device, requires_grad=True)
            if ctx.needs_input_grad[0]:
                dx = differentiable_gradients(product, [blank, *p], [True, *[False] * len(p)], g)[0]
            if ctx.needs_input_grad[0] and on_u is not None:
                B, A = ctx.build(*p)
                r = B.shape[1] if ctx.half is None else ctx.half
                reads = lambda x: inner(x, A if A is None else A[: ctx.half], r)  # noqa: E731
                dx = cast(Tensor, dx) + cast(Tensor, differentiable_gradients(reads, [blank], [True], on_u)[0])
            grads = differentiable_gradients(from_inner, [u, *p], [False, *needs], g)[1:] if any(needs) else needs
        return [dx, *(grad if isinstance(grad, Tensor) else None for grad in grads)]


def sum_pays(tokens: int, W: Tensor, doubled: bool) -> bool:
    """Return whether x (W + B A)ᵀ, with the sum built in each pass, is faster than x Wᵀ and (x Aᵀ) Bᵀ.

    This is so for many tokens, where the sum holds a small B A. It saves 2 T r (out + in) operations (doubled, 6), and
    the sums take 4 r out in (8), at half the speed of a thin product. They are then smaller than x or y.
    """
    out, inp = W.shape
    return holds_changes(W) and tokens * (out + inp) * (3 if doubled else 2) > 8 * out * inp


def folded(v: Tensor, half: int | None) -> Tensor:
    """Return the sum of both halves of v's columns, if it has two."""
    return v if half is None else v[:, :half] + v[:, half:]
