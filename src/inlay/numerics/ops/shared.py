"""Share code between the autograd functions of this folder: strips, precision, block sums, seeds, processes."""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SCRATCH = 1 << 22  # entries of ΔW built at a time (a quarter for a dropout mask on a CPU); on a GPU eight times as many
TALL = 512  # rows below which a product of many columns takes longer per row

TWICE = "run the forward pass in `with inlay.second_derivatives():`"
_plain = False

Linear = tuple[Tensor, Tensor | None]  # W (out × in) and bias
Factors = Callable[..., tuple[Tensor, Tensor | None]]


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Compute adapted layers with torch's own functions, which keep what any derivative needs, until the block ends.

    Gradients of gradients, `torch.func` and forward-mode derivatives are then right for every method.
    """
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def takes_reference() -> bool:
    """Return whether torch's functions compute: in `second_derivatives`, or where a compiler decides what is kept."""
    return _plain or torch.compiler.is_compiling()


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], g: Tensor
) -> list[Tensor | None]:
    """Return the gradients of `function(*inputs)` for the slope `g`, in a graph that can be differentiated again.

    A backward pass calls it where one asked for that graph (create_graph=True). Inputs are aliased, so that a
    gradient does not run on from one to another that it was computed from.

    Args:
        function: the same function in torch's own operations.
        inputs: what it is called with, as the forward pass was given it.
        needs: for which inputs a gradient is wanted; None is returned for the others.
        g: the gradient of the output, in its shape.
    """
    aliases = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
    with own_precision(g.device.type):
        y = function(*aliases)
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, g.view_as(y).to(y.dtype), create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]


def plain_linear(base: object, x: Tensor) -> Linear | None:
    """Return the (W, bias) of a base that is a plain frozen nn.Linear in x's dtype, for joint products.

    None where that is unknown or impossible: a quantised base, hooks, a trained weight, autocast to another dtype, a
    graph being compiled.
    """
    linear: Linear | None = None if takes_reference() else getattr(base, "linear", None)
    if linear is None:
        return None
    W = linear[0]
    return linear if W.dtype == x.dtype == product_dtype(x) and W.device == x.device else None


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which nn.Linear multiplies x here: its own, or autocast's."""
    on = autocast_is_on(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def own_precision(device: str) -> AbstractContextManager:
    """Return a context without autocast; entering one is slow, so it is real only where autocast is on."""
    return torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext()


def autocast_is_on(device: str) -> bool:
    """Return whether autocast is on, also for devices that have none, such as meta."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def scratch(like: Tensor) -> int:
    return SCRATCH << 3 if like.is_cuda else SCRATCH


def fused(*tensors: Tensor) -> Any:
    """Return the module of Triton kernels where it can take these tensors, else None; INLAY_TRITON=0 disables it."""
    if os.environ.get("INLAY_TRITON") == "0" or torch.compiler.is_compiling():
        return None
    usable = all(t.is_cuda for t in tensors) or os.environ.get("TRITON_INTERPRET") == "1"
    if not usable or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return None
    return kernels_on(tensors[0].device)


@functools.cache
def kernels_on(device: torch.device) -> Any:
    try:
        from inlay.numerics import triton_kernels

        triton_kernels.train_rows(torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, 1, device=device))
    except Exception as error:  # no Triton, or no C compiler to build its launcher
        warnings.warn(f"Triton cannot be used, so torch does its work more slowly: {error}", stacklevel=2)
        return None
    return triton_kernels


def holds_changes(W: Tensor) -> bool:
    """Return whether a product with W + ΔW preserves a small ΔW.

    Half precision and TF32 do not: they round the sum to 3 digits.
    """
    backend = torch.backends.cuda if W.is_cuda else torch.backends.mkldnn
    return W.element_size() > 4 or (W.element_size() == 4 and backend.matmul.fp32_precision in ("none", "ieee"))  # pyright: ignore


def leaves_of(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Return the tensors as the leaves of a graph of their own."""
    return [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]


def pull(built: Sequence[tuple[Tensor | None, Tensor | None]], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of leaves, None for those that need none, from the slopes of tensors built of them."""
    pairs = [(t, slope.to(t.dtype)) for t, slope in built if t is not None and slope is not None and t.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    ends, slopes = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(ends, [leaf for leaf in leaves if leaf.requires_grad], slopes))
    return [next(grads) if leaf.requires_grad else None for leaf in leaves]


def tiles(r: int, inp: int, like: Tensor) -> Tensor | None:
    """Return [I I ... I], (r × in), in half precision, where multiplying by it beats adding blocks; None in others.

    The product sums in fp32.
    """
    if like.element_size() >= 4:
        return None
    # What is created to count bytes, under a dispatch mode or while a CUDA graph is captured must not outlive it.
    capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
    passing = like.is_meta or type(like) is not Tensor or capturing
    return (tiled.__wrapped__ if passing else tiled)(r, inp, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def tiled(r: int, inp: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a training may use it next
        return torch.eye(r, dtype=dtype, device=device).repeat(1, -(-inp // r))[:, :inp]


def block_sum(x: Tensor, r: int) -> Tensor:
    """Return Σ_j x[..., jr : (j+1)r], (..., r), summed in at least fp32 without a copy; the last block may be short."""
    dtype, tail = torch.promote_types(x.dtype, torch.float32), x.shape[-1] % r
    S = x[..., : x.shape[-1] - tail].unflatten(-1, (-1, r)).sum(-2, dtype=dtype)
    return S + F.pad(x[..., x.shape[-1] - tail :], (0, r - tail)) if tail else S


def add_blocks(x: Tensor, v: Tensor) -> Tensor:
    """Add v (n × r) to every block of r columns of x (n × in), in place: the transpose of `block_sum`."""
    r, tail = v.shape[1], x.shape[1] % v.shape[1]
    x[:, : x.shape[1] - tail].unflatten(1, (-1, r)).add_(v[:, None])
    if tail:
        x[:, x.shape[1] - tail :].add_(v[:, :tail])
    return x


def seed_of(*values: int | str) -> int:
    """Return one seed of several numbers and words, unrelated for any that differ."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:7])


def of_the_first(value: Tensor) -> Tensor:
    """Replace a value, in place, by that of the first process; all processes have to call this."""
    if dist.is_initialized():
        dist.broadcast(value, 0)
    return value


def all_finite(value: Tensor) -> bool:
    """Return whether a tensor is finite in every process; all have to call this."""
    return not mean_of_all((~value.isfinite()).any().float())


def mean_of_all(value: Tensor) -> Tensor:
    """Replace a value, in place, by its mean over the processes, as DDP does with gradients; all have to call this."""
    if dist.is_initialized():
        dist.all_reduce(value.div_(dist.get_world_size()))
    return value
