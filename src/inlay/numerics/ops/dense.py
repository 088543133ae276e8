"""Apply changes ΔW that are built a few rows at a time, in both passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.numerics.ops import shared
from inlay.numerics.ops.shared import (
    Linear,
    differentiable_gradients,
    holds_changes,
    leaves_of,
    own_precision,
    product_dtype,
    pull,
    scratch,
    takes_reference,
)


@dataclass(frozen=True)
class Rows:
    """Build a matrix D (out × in) a few rows at a time: D[i:j] = rows(i, j, *build(*tensors)).

    i and j are multiples of `step`, and `rows` returns a tensor of its own, not a view. With a step of 0, `build`
    returns D itself. In bf16 the parts that `build` returns are rounded and the rows built of them, else the rows are
    rounded.
    """

    build: Callable[..., tuple[Tensor, ...]]
    rows: Callable[..., Tensor] = lambda i, j, D: D
    out: int = 0
    step: int = 0

    def parts(self, dtype: torch.dtype, tensors: Sequence[Tensor]) -> list[Tensor]:
        narrow = dtype == torch.bfloat16
        return [t.to(dtype) if narrow else t for t in self.build(*tensors)]

    def strips(self, parts: Sequence[Tensor], inp: int) -> list[tuple[int, int]]:
        """Return the borders of groups of rows that fit the scratch size."""
        if not self.step:
            return [(0, len(parts[0]))]
        height = -(-max(shared.TALL, scratch(parts[0]) // inp) // self.step) * self.step
        return list(itertools.pairwise([*range(0, self.out, height), self.out]))


def begun(x: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """Return a (rows of x × out) tensor to which products are added, filled with the bias if there is one.

    The bias comes first, as in nn.Linear, or one rounding would differ.
    """
    return x.new_empty(len(x), out) if bias is None else bias.expand(len(x), -1).clone()


def dense(x: Tensor, linear: Linear | None, D: Rows, *p: Tensor) -> Tensor:
    """Return x Wᵀ + bias + x Dᵀ, (..., out).

    x and p are kept; D's rows are temporary, and so are those of gᵀx. In fp32 and wider W + D is multiplied at once:
    three products of the size of a layer in all, the floor of a dense update, where a second product beside the layer's
    own makes five. In bf16 or TF32 that would round a small D away.
    """
    if takes_reference():
        return dense_reference(x, linear, D, *p)
    return _Dense.apply(x, *(linear or (None, None)), D, *p)


def dense_reference(x: Tensor, linear: Linear | None, D: Rows, *p: Tensor) -> Tensor:
    """Return what `dense` computes."""
    parts = D.build(*p)
    y = F.linear(x, D.rows(0, D.out or len(parts[0]), *parts).to(x.dtype))
    return y if linear is None else F.linear(x, *linear) + y


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor | None, bias: Tensor | None, D: Rows, *p: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, *p)
        ctx.D, dtype = D, product_dtype(x)
        with own_precision(x.device.type):
            flat, parts = x.reshape(-1, x.shape[-1]).to(dtype), D.parts(dtype, p)
            strips = D.strips(parts, x.shape[-1])
            beside = W is not None and not holds_changes(W)
            y = F.linear(flat, cast(Tensor, W), bias) if beside else begun(flat, bias, strips[-1][1])
            for i, j in strips:
                rows = D.rows(i, j, *parts).to(dtype)
                if W is not None and not beside:
                    rows.add_(W[i:j])
                y[:, i:j].addmm_(flat, rows.T, beta=int(beside or bias is not None))
            ctx.beside = beside
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, g: Tensor):
        x, W, *p = ctx.saved_tensors
        D, inp = ctx.D, x.shape[-1]
        g = g.reshape(-1, g.shape[-1])
        if torch.is_grad_enabled():  # create_graph=True
            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
            linear = None if W is None else (W, None)
            function = lambda x, *p: dense_reference(x.reshape(-1, inp).to(g.dtype), linear, D, *p)  # noqa: E731
            dx, *grads = differentiable_gradients(function, [x, *p], needs, g)
            return dx, None, None, None, *grads
        with own_precision(g.device.type):
            leaves, flat = leaves_of(p, ctx.needs_input_grad[4:]), x.reshape(-1, inp).to(g.dtype)
            with torch.enable_grad():
                parts = D.parts(g.dtype, leaves)
            ends = leaves_of(parts, [t.requires_grad for t in parts])
            wanted = [t for t in ends if t.requires_grad]
            slopes: list[Any] = [None] * len(wanted)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = g @ W if ctx.beside else torch.zeros_like(flat)
            for i, j in D.strips(parts, inp):
                with torch.enable_grad():
                    rows = D.rows(i, j, *ends)
                if dx is not None:
                    values = rows.detach().to(g.dtype)
                    dx.addmm_(g[:, i:j], values if W is None or ctx.beside else values + W[i:j])
                if wanted:
                    slope = (g[:, i:j].T @ flat).to(rows.dtype)
                    new = torch.autograd.grad(rows, wanted, slope)
                    slopes = [n if old is None else old.add_(n) for old, n in zip(slopes, new, strict=True)]
            grads = pull([(t, s) for t, s in zip([t for t in parts if t.requires_grad], slopes, strict=True)], leaves)
        return None if dx is None else dx.view_as(x).to(x.dtype), None, None, None, *grads


def watched(D: Tensor, look: Callable[[Tensor], None]) -> Tensor:
    """Return D, whose gradient is passed to `look` in a backward pass that is not compiled nor on the meta device.

    Gradients that are to be differentiated again are not passed: they are no gradients of what is minimised.
    """

    def show(slope: Tensor) -> None:
        if not torch.is_grad_enabled():
            look(slope)

    if D.requires_grad and not D.is_meta and not torch.compiler.is_compiling():
        D.register_hook(show)
    return D


def bat_col_delta(W: Tensor, B: Tensor) -> Tensor:
    """Return ΔW_ab = W_ab B_a + B_a for W (out × in) and B (out/r × r × r), in B's dtype."""
    a, r, _ = B.shape
    blocks = W.to(B.dtype).reshape(a, -1, r) @ B
    return (blocks.unflatten(1, (r, -1)) + B[:, :, None]).flatten(2).flatten(0, 1)
