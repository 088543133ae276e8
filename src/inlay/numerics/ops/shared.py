"""Autograd functions that keep as little for the backward pass as the mathematics allows, each with its reference.

All of them compute y = x (W + ΔW)ᵀ + bias, differentiable in x and in what ΔW is built from. Where the layer under the
change is a plain frozen nn.Linear (`plain`), its product and the small ones join: they are added into its output, and
into its dx, so that no second tensor of such a size is written and read again. Elsewhere W is None, y is the change
alone, and the caller adds the layer's own output. ΔW's tensors are kept by reference and what is built of them is built
twice; x is kept by reference, in no other dtype, or not at all.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SCRATCH = 1 << 22  # numbers of ΔW built at a time, four times those of a dropout mask; on a GPU eight times as many
TALL = 512  # rows below which a product of many columns is slower by the row

Linear = tuple[Tensor, Tensor | None]  # W (out × in) and bias
Factors = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Dropout:
    """Dropout of this step; a p of 0 is none. `saver`: how `low_rank` keeps x where A is trained (see `SAVERS`)."""

    p: float = 0.0
    saver: str = "none"

    def __call__(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p) if self.p else x


keep = Dropout()


@dataclass(frozen=True)
class Rows:
    """A matrix D (out × in) that is built a few rows at a time: D[i:j] = rows(i, j, *build(*tensors)).

    i and j are multiples of `step`, and `rows` gives a tensor of its own, not a view. A step of 0: `build` gives D
    itself. In bf16 the parts that `build` gives are rounded and the rows built of them, else the rows are rounded.
    """

    build: Callable[..., tuple[Tensor, ...]]
    rows: Callable[..., Tensor] = lambda i, j, D: D
    out: int = 0
    step: int = 0

    def parts(self, dtype: torch.dtype, tensors: Sequence[Tensor]) -> list[Tensor]:
        narrow = dtype == torch.bfloat16
        return [t.to(dtype) if narrow else t for t in self.build(*tensors)]

    def strips(self, parts: Sequence[Tensor], inp: int) -> list[tuple[int, int]]:
        """The borders of groups of rows that fit the scratch size."""
        if not self.step:
            return [(0, len(parts[0]))]
        height = -(-max(TALL, scratch(parts[0]) // inp) // self.step) * self.step
        return list(itertools.pairwise([*range(0, self.out, height), self.out]))


def plain(base: Any, x: Tensor) -> Linear | None:
    """The (W, bias) of a base that is nothing but a frozen nn.Linear in x's dtype, for products that join with its own.

    None where that cannot be told or done: a quantised base, hooks, a trained weight, autocast to another dtype, a
    graph being compiled.
    """
    found = None if torch.compiler.is_compiling() else getattr(base, "linear", None)
    fits = found is not None and found[0].dtype == x.dtype == product_dtype(x) and found[0].device == x.device
    return found if fits else None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which nn.Linear multiplies x here: its own, or autocast's."""
    on = autocast_is_on(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def own_precision(device: str) -> AbstractContextManager:
    """Autocast off; entering that is slow, so only where it is on."""
    return torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext()


def autocast_is_on(device: str) -> bool:
    """Also asked of devices that have none, such as meta."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def scratch(like: Tensor) -> int:
    return SCRATCH << 3 if like.is_cuda else SCRATCH


def fused(*tensors: Tensor) -> Any:
    """The module of Triton kernels, where it can take these tensors; INLAY_TRITON=0 switches it off."""
    if os.environ.get("INLAY_TRITON") == "0" or torch.compiler.is_compiling():
        return None
    there = all(t.is_cuda for t in tensors) or os.environ.get("TRITON_INTERPRET") == "1"
    if not there or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return None
    return kernels_on(tensors[0].device)


@functools.cache
def kernels_on(device: torch.device) -> Any:
    try:
        from inlay import kernels

        kernels.train_rows(torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, 1, device=device))
    except Exception as error:  # no Triton, or no C compiler for it to build its launcher with
        warnings.warn(f"Triton cannot be used, torch does its work more slowly: {error}", stacklevel=2)
        return None
    return kernels


# -- ΔW = B A ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Builds s B A, or s ((B − B₀) A + B₀ (A − A₀)) as one product of (out × 2r) and (2r × in), from (A, B), or from B
    alone. Zero at the start in any order of products, and nothing large cancels. `start` is (A₀, B₀).

    Its gradients are written out: a graph of its own for them takes longer than a small layer does. Where it is
    `doubled`, so wide for the start, they are of the first half of A and of the sum of both halves of B.
    """

    s: float = 1.0
    start: tuple[Tensor, Tensor] | None = None

    def __call__(self, *p: Tensor) -> tuple[Tensor, Tensor | None]:
        *A, B = p
        if self.start is not None:
            A0, B0 = self.start
            A, B = [torch.cat([A[0], A[0] - A0])], torch.cat([B - B0, B0], 1)
        return scaled(self.s, B), A[0] if A else None

    @property
    def doubled(self) -> bool:
        return self.start is not None

    def pull(self, p: Sequence[Tensor], dB: Tensor | None, dA: Tensor | None) -> list[Tensor | None]:
        """The gradients of p from those of what was built, None for None."""
        dB = None if dB is None else scaled(self.s, dB)
        return [None if d is None else d.to(t.dtype) for d, t in zip((dA, dB)[-len(p) :], p, strict=True)]


@dataclass(frozen=True)
class Core:
    """Builds s B S A, or s ((B − B₀) S + B₀ (S − S₀)) A, from a frozen A, S, and B in blocks of columns; as `Pair`.
    `start` is S₀ and the blocks of B₀."""

    s: float = 1.0
    start: Sequence[Tensor] = ()

    def __call__(self, A: Tensor, S: Tensor, *blocks: Tensor) -> tuple[Tensor, Tensor]:
        B = torch.cat(blocks, 1)
        if not self.start:
            return scaled(self.s, B @ S), A
        S0, B0 = self.start[0], torch.cat(list(self.start[1:]), 1)
        return scaled(self.s, torch.addmm(B0 @ (S - S0), B - B0, S)), A

    def pull(self, p: Sequence[Tensor], dB: Tensor | None, dA: Tensor | None) -> list[Tensor | None]:
        """As `Pair.pull`: B S A has the slopes Bᵀ (dB) for S and (dB) Sᵀ for B."""
        _, S, *blocks = p
        if dB is None:
            return [None] * len(p)
        dB = scaled(self.s, dB.to(S.dtype))
        each: Any = torch.split_with_sizes_copy(dB @ S.T, [block.shape[1] for block in blocks], 1)
        return [None, torch.cat(blocks, 1).T @ dB, *each]


def scaled(s: float, t: Tensor) -> Tensor:
    return t if s == 1 else s * t


def low_rank(x: Tensor, linear: Linear | None, build: Factors, on_x: bool, drop: Dropout, *p: Tensor) -> Tensor:
    """x Wᵀ + bias + (x Aᵀ) Bᵀ, (..., out), for (B, A) = build(*p), which is called in both passes.

    p and x Aᵀ, r wide, are kept, and x if `on_x`, where A is trained. An A of None stands for [I I ... I] (r × in):
    x Aᵀ is then the sum of x's blocks. Dropout is on x if x is kept, else on x Aᵀ; its seed is kept, and no mask.
    With a saver in `drop` less than x is kept, and A's gradient is an estimate; nothing else is (nor if compiled).
    Where `sum_pays`, W + B A is made in both passes and multiplied. A `build` that is `doubled` is given the gradients
    of the halves it names.
    """
    if torch.compiler.is_compiling():  # the compiler decides itself what to keep and what to compute twice
        return low_rank_reference(x, linear, *build(*p), drop, on_x)
    return _LowRank.apply(x, *(linear or (None, None)), build, on_x, drop, *p)


def low_rank_reference(
    x: Tensor, linear: Linear | None, B: Tensor, A: Tensor | None, drop: Dropout = keep, on_x: bool = True
) -> Tensor:
    """What `low_rank` computes."""
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
    ) -> Tensor:
        dtype, drop, ctx.saver = product_dtype(x), how.p, SAVERS.get(how.saver)
        ctx.build, ctx.drop, ctx.shape, ctx.dtype = build, drop, x.shape, x.dtype
        ctx.seed = int(torch.randint(1 << 62, (), device="cpu")) if drop else 0
        with own_precision(x.device.type):
            flat, (B, A) = x.reshape(-1, x.shape[-1]).to(dtype), build(*p)
            ctx.on_x, doubled = on_x and A is not None, getattr(build, "doubled", False)
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
                    for rows, mask in masks(u.shape, u, drop, ctx.seed) if drop else ():
                        u[rows] *= mask
                y = u @ B.T if W is None else F.linear(flat, W, bias).addmm_(u, B.T)
                u = u if half is None else u[:, :half].clone()
            kept: tuple[Tensor | None, ...] = (x if ctx.on_x and any(ctx.needs_input_grad[6:]) else None,)
            if ctx.saver is not None and kept[0] is not None:
                kept = ctx.saver.keep(flat)
        ctx.kept = len(kept)
        ctx.save_for_backward(*kept, u, W, *p)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        saved = ctx.saved_tensors  # to be read once
        kept, (u, W, *p) = saved[: ctx.kept], saved[ctx.kept :]
        x = kept[0]
        g, inp = g.reshape(-1, g.shape[-1]), ctx.shape[-1]
        with own_precision(g.device.type):
            needs, written = ctx.needs_input_grad[6:], hasattr(ctx.build, "pull")
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
            left, dA, dx = B.detach().to(g.dtype), None, None
            v: Any = None  # g B, which the sum spares where A is frozen
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
                for rows, mask in masks(v.shape, v, ctx.drop, ctx.seed) if ctx.drop else ():
                    v[rows] *= mask
                if dx is not None and not ctx.joined:
                    add_blocks(dx, v) if right is None else dx.addmm_(v, right)
                if trained is not None:
                    w = v if ctx.joined else folded(v, ctx.half)
                    dA = w.T @ flat if flat is not None else cast(Any, ctx.saver).product(w, *kept)
            dB = (u.T @ g).T if trains_B else None
            grads = ctx.build.pull(p, dB, dA) if written else pull([(B, dB), (A, dA)], leaves)
        return None if dx is None else dx.view(ctx.shape).to(ctx.dtype), None, None, None, None, None, *grads


def sum_pays(tokens: int, W: Tensor, doubled: bool) -> bool:
    """Whether x (W + B A)ᵀ, with that sum made in each pass, is faster than x Wᵀ and (x Aᵀ) Bᵀ: for many tokens, and
    where the sum holds a small B A. It saves 2 T r (out + in) operations (doubled, 6), and the sums take 4 r out in
    (8), at half the speed of a thin product. They are then smaller than x or y."""
    out, inp = W.shape
    return holds_changes(W) and tokens * (out + inp) * (3 if doubled else 2) > 8 * out * inp


def holds_changes(W: Tensor) -> bool:
    """Whether a product with W + ΔW sees a small ΔW: not in half precision or TF32, which round the sum to 3 digits."""
    backend = torch.backends.cuda if W.is_cuda else torch.backends.mkldnn
    return W.element_size() > 4 or (W.element_size() == 4 and backend.matmul.fp32_precision in ("none", "ieee"))  # pyright: ignore


def folded(v: Tensor, half: int | None) -> Tensor:
    """The sum of both halves of v's columns, if it has two."""
    return v if half is None else v[:, :half] + v[:, half:]


def begun(x: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """A (rows of x × out) tensor for products to be added to: with the bias in it first, as nn.Linear does, or one
    rounding would differ; without one, with nothing."""
    return x.new_empty(len(x), out) if bias is None else bias.expand(len(x), -1).clone()


class Velora:
    """Each token in 32 (or fewer) parts, of each part its length along one direction v, the mean part of this batch:
    x̂ = (x v) vᵀ, and dA = gᵀ x̂. Miles, Reddy, Elezi, Deng 2024, "VeLoRA: Memory Efficient Training using Rank-1
    Sub-Token Projections", arXiv 2405.17991. Biased: what of x is orthogonal to v is lost, in every step. [ours]: v is
    of each batch, where the paper keeps that of the first; so there is no state."""

    @staticmethod
    def keep(x: Tensor) -> tuple[Tensor, ...]:
        parts = x.unflatten(1, (math.gcd(x.shape[1], 32), -1))
        v = F.normalize(parts.mean((0, 1), dtype=torch.promote_types(x.dtype, torch.float32)), dim=0).to(x.dtype)
        return parts @ v, v

    @staticmethod
    def product(g: Tensor, c: Tensor, v: Tensor) -> Tensor:
        return ((g.T @ c)[:, :, None] * v).flatten(1)


class WTACRS:
    """k = 0.3 T of the T tokens: the c longest ones as they are, and k − c drawn from the rest by their lengths,
    weighted so that the mean of dA is gᵀ x. Liu et al. 2023, "Winner-Take-All Column Row Sampling for Memory Efficient
    Adaptation of Language Model", arXiv 2305.15265. c gives the least bound on the variance, (1 − P) / (k − c) with P
    the share of the longest. [ours]: shares by ‖x_i‖ alone; the paper also uses the norms of earlier gradients."""

    @staticmethod
    def keep(x: Tensor) -> tuple[Tensor, ...]:
        k = max(1, math.ceil(0.3 * len(x)))
        share, order = x.norm(dim=1, dtype=torch.promote_types(x.dtype, torch.float32)).sort(descending=True)
        share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
        rest = 1 - F.pad(share.cumsum(0)[: k - 1], (1, 0))  # what is left when c = 0, 1, ... k - 1 are taken
        c = int((rest / torch.arange(k, 0, -1, device=x.device)).argmin())
        left = share[c:].clamp_min(torch.finfo(share.dtype).tiny)
        drawn = torch.multinomial(left, k - c, replacement=True)
        weight = F.pad(left.sum() / ((k - c) * left[drawn]), (c, 0), value=1.0)
        chosen = order[torch.cat([torch.arange(c, device=x.device), drawn + c])]
        return x[chosen], chosen, weight.to(x.dtype)

    @staticmethod
    def product(g: Tensor, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        return (g[chosen] * weight[:, None]).T @ x


SAVERS = {"velora": Velora, "wta_crs": WTACRS}  # what of x (T × in) is kept, and gᵀ x, (r × in), from it and g (T × r)


def leaves_of(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """The tensors anew, as the leaves of a graph of their own."""
    return [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]


def pull(built: Sequence[tuple[Tensor | None, Tensor | None]], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of leaves, None for those that want none, from the slopes of tensors built of them."""
    pairs = [(t, slope.to(t.dtype)) for t, slope in built if t is not None and slope is not None and t.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    ends, slopes = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(ends, [leaf for leaf in leaves if leaf.requires_grad], slopes))
    return [next(grads) if leaf.requires_grad else None for leaf in leaves]


def masks(shape: Sequence[int], like: Tensor, p: float, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """The dropout mask of a seed for a (rows × width) tensor, scaled, in strips of rows; p to the nearest of 2⁻¹⁶."""
    generator = None if like.is_meta else torch.Generator(like.device).manual_seed(seed)
    size = scratch(like) if like.is_cuda else SCRATCH >> 2  # less memory on a CPU, in about the same time
    height, dropped = max(1, size // shape[1]), min(round(p * 65536), 65535)
    for i in range(0, shape[0], height):
        rows = slice(i, min(i + height, shape[0]))
        yield rows, draw_mask(like.new_empty(rows.stop - i, shape[1]), dropped, generator)


def draw_mask(out: Tensor, dropped: int, generator: torch.Generator | None) -> Tensor:
    """`out`, filled: an entry is 0 with a probability of dropped / 65536. One random number of 64 bits serves four
    entries, as torch's own Bernoulli takes six times as long on many CPUs."""
    drawn = out.new_empty(-(-out.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    bits = drawn.view(torch.int16)[: out.numel()].view(out.shape)
    return torch.ge(bits, dropped - 32768, out=out).mul_(65536 / (65536 - dropped))


def tiles(r: int, inp: int, like: Tensor) -> Tensor | None:
    """[I I ... I], (r × in), in half precision, which multiplies faster than it adds, and sums in fp32; else None."""
    if like.element_size() >= 4:
        return None
    # What is made for a count of bytes, under a dispatch mode or in the capture of a CUDA graph is not to outlive it.
    capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
    passing = like.is_meta or type(like) is not Tensor or capturing
    return (tiled.__wrapped__ if passing else tiled)(r, inp, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def tiled(r: int, inp: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(r, dtype=dtype, device=device).repeat(1, -(-inp // r))[:, :inp]


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


def seed_of(*values: int | str) -> int:
    """One seed of several numbers and words, unrelated for any that differ."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:7])


# -- noise on the weight ----------------------------------------------------------------------------------------------


def noise(x: Tensor, sigma: Tensor, seed: int) -> Tensor:
    """x Eᵀ, (..., out), with E[o] Gaussian of standard deviation sigma[o], (out × in). E is built from the seed, a few
    rows at a time, here and again for dx; only sigma is kept."""
    return _Noise.apply(x, sigma, seed)


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sigma: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(sigma)
        ctx.seed, ctx.shape, ctx.dtype, dtype = seed, x.shape, x.dtype, product_dtype(x)
        with own_precision(x.device.type):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            y = flat.new_empty(len(flat), len(sigma))
            for rows, E in gaussian(sigma.to(dtype), x.shape[-1], seed):
                y[:, rows].addmm_(flat, E.T, beta=0)
        return y.view(*x.shape[:-1], len(sigma))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        (sigma,) = ctx.saved_tensors
        with own_precision(g.device.type):
            g = g.reshape(-1, g.shape[-1])
            dx = g.new_zeros(len(g), ctx.shape[-1])
            for rows, E in gaussian(sigma.to(g.dtype), ctx.shape[-1], ctx.seed):
                dx.addmm_(g[:, rows], E)
        return dx.view(ctx.shape).to(ctx.dtype), None, None


def gaussian(sigma: Tensor, inp: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """Gaussian rows (out × in), row o of standard deviation sigma[o], in strips."""
    generator = torch.Generator(sigma.device).manual_seed(seed)
    height = max(1, SCRATCH // inp)
    for i in range(0, len(sigma), height):
        rows = slice(i, min(i + height, len(sigma)))
        E = sigma.new_empty(rows.stop - i, inp).normal_(generator=generator)
        yield rows, E.mul_(sigma[rows, None])


# -- any ΔW -----------------------------------------------------------------------------------------------------------


def dense(x: Tensor, linear: Linear | None, D: Rows, *p: Tensor) -> Tensor:
    """x Wᵀ + bias + x Dᵀ, (..., out). x and p are kept; D's rows live for a moment, and so do those of gᵀx.

    In fp32 and wider W + D is multiplied at once: three products of the size of a layer in all, the floor of a dense
    update, where a second product beside the layer's own makes five. In bf16 or TF32 that would round a small D away.
    """
    if torch.compiler.is_compiling():
        return dense_reference(x, linear, D, *p)
    return _Dense.apply(x, *(linear or (None, None)), D, *p)


def dense_reference(x: Tensor, linear: Linear | None, D: Rows, *p: Tensor) -> Tensor:
    """What `dense` computes."""
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
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, W, *p = ctx.saved_tensors
        D, inp, g = ctx.D, x.shape[-1], g.reshape(-1, g.shape[-1])
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
                    own = rows.detach().to(g.dtype)
                    dx.addmm_(g[:, i:j], own if W is None or ctx.beside else own + W[i:j])
                if wanted:
                    slope = (g[:, i:j].T @ flat).to(rows.dtype)
                    new = torch.autograd.grad(rows, wanted, slope)
                    slopes = [n if old is None else old.add_(n) for old, n in zip(slopes, new, strict=True)]
            grads = pull([(t, s) for t, s in zip([t for t in parts if t.requires_grad], slopes, strict=True)], leaves)
        return None if dx is None else dx.view_as(x).to(x.dtype), None, None, None, *grads


def watched(D: Tensor, look: Callable[[Tensor], None]) -> Tensor:
    """D, whose gradient `look` is shown in a backward pass: not if that is compiled, or on the meta device."""
    if D.requires_grad and not D.is_meta and not torch.compiler.is_compiling():
        D.register_hook(look)
    return D


def of_the_first(value: Tensor) -> Tensor:
    """The first process's, in place, where torch.distributed has several: all have to ask for it."""
    dist.broadcast(value, 0) if dist.is_initialized() else None
    return value


def mean_of_all(value: Tensor) -> Tensor:
    """The mean over the processes, in place, as of the gradients in DDP; all have to ask for it."""
    dist.all_reduce(value.div_(dist.get_world_size())) if dist.is_initialized() else None
    return value


def bat_col_delta(W: Tensor, B: Tensor) -> Tensor:
    """ΔW_ab = W_ab B_a + B_a for W (out × in) and B (out/r × r × r), in B's dtype."""
    a, r, _ = B.shape
    blocks = W.to(B.dtype).reshape(a, -1, r) @ B
    return (blocks.unflatten(1, (r, -1)) + B[:, :, None]).flatten(2).flatten(0, 1)


# -- a few blocks of ΔW -----------------------------------------------------------------------------------------------


def blocks(x: Tensor, linear: Linear | None, D: Tensor, rows: Tensor, cols: Tensor, out: int) -> Tensor:
    """x Wᵀ + bias + x ΔWᵀ, (..., out), where block (rows[b], cols[b]) of ΔW is D[b] and the rest is 0; D (n × r × r).

    The n columns of blocks that are read are kept of x, in a copy, or x where they are no fewer.
    """
    if torch.compiler.is_compiling():
        return blocks_reference(x, linear, D, rows, cols, out)
    return _Blocks.apply(x, *(linear or (None, None)), D, rows, cols, out)


def blocks_reference(x: Tensor, linear: Linear | None, D: Tensor, rows: Tensor, cols: Tensor, out: int) -> Tensor:
    """What `blocks` computes."""
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
        r, inp, g = D.shape[1], ctx.shape[-1], g.reshape(-1, g.shape[-1])
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
    """Blocks of r columns of x (T × in), in a copy (n × T × r): a view would keep all of x alive."""
    return x.unflatten(1, (-1, r)).transpose(0, 1)[which].contiguous()


# -- W (x + blockdiag(B) x) -------------------------------------------------------------------------------------------


def bat(x: Tensor, linear: Linear, B: Tensor) -> Tensor:
    """W (x + t) + tile(Σ_b t_b) + bias, (..., out), with t = blockdiag(B) x; B (in/r × r × r). x and B are kept.

    Blocks are multiplied a few at once, as the diagonal of a larger one: an r × r product is too small to be fast.
    """
    return _Bat.apply(x, *linear, B)


def bat_reference(x: Tensor, base: Callable[[Tensor], Tensor], B: Tensor, drop: Dropout = keep) -> Tensor:
    """What `bat` computes, over any layer."""
    t = torch.einsum("...bp,bqp->...bq", drop(x).unflatten(-1, (-1, B.shape[1])), B.to(x.dtype))
    y = base(x + t.flatten(-2))
    return y + t.sum(-2).repeat(*[1] * (t.dim() - 2), y.shape[-1] // B.shape[1])


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
        add_blocks(y, total) if right is None else y.addmm_(total, right)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, W, B = ctx.saved_tensors
        g, flat, r = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]), B.shape[1]
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
    """Groups of rows that fit a CPU's cache; on a GPU all of them."""
    height = max(1, len(x) if x.is_cuda else (SCRATCH >> 3) // x.shape[1])
    for i in range(0, len(x), height):
        yield slice(i, min(i + height, len(x)))


def diagonal(B: Tensor) -> Tensor:
    """Blocks (n × r × r) joined to fewer, block-diagonal ones, (n/m × mr × mr)."""
    n, r, _ = B.shape
    m = next(m for m in range(max(1, (32 if B.element_size() >= 4 else 64) // r), 0, -1) if n % m == 0)
    E = B.new_zeros(n // m, m, r, m, r)
    E.diagonal(dim1=1, dim2=3).copy_(B.view(-1, m, r, r).permute(0, 2, 3, 1))
    return E.view(n // m, m * r, m * r)
