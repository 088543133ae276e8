"""Simulate one training step: the real code runs on tensors that have shapes but no memory.

What `inlay train` does in a step (trl's loss, the backward pass, torch's AdamW) runs on the meta device, and every
tensor is counted from its creation to its deletion, so no code here depends on what a method or model keeps. Workspace
within a kernel is not seen. Two things would run differently there than on a device and have a stand-in: attention, and
the head with its loss.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from inlay.host.slot import Slot
from inlay.host.stand_in import StandIn
from inlay.models.sizes import count_trainable, layers_of

ATEN = torch.ops.aten
FLOPS = {
    **flop_registry,
    ATEN.addmm_: flop_registry[ATEN.addmm],
    ATEN.baddbmm_: flop_registry[ATEN.baddbmm],
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}


# Bytes that live only within an operation of bitsandbytes: a dequantised weight with its scales, sums in 32 bits.
WITHIN = {
    "bitsandbytes.gemm_4bit.default": lambda out, x, W, shape, *_: math.prod(shape) * (x.element_size() + 4 / 64),
    "bitsandbytes.int8_scaled_mm.default": lambda out, *_: 4 * out.numel(),
}

TILE = (4096, 32768)  # tokens × vocabulary entries
COPIES = {"cpu": (13, 29), "cuda": (0, 0)}  # bytes beside each entry of a tile, forward and backward


@dataclass(frozen=True)
class Step:
    """Hold what a step trains, keeps (in bytes) and computes; every field is affine in the number of equal layers.

    Attributes:
        parameters: how many parameters are trained.
        file: the adapter as saved (the whole model where all of it is trained).
        frozen: weights and buffers that are not trained, θ₀ among them.
        trained: the trained parameters.
        gradients: of the trained parameters.
        optimizer: AdamW's moments.
        activations: kept from the forward pass for the backward pass.
        forward, top, bottom, update: the peak in the forward pass and the loss, in the backward pass down to the first
            layer, in that layer, and in the optimiser's step.
        flops: of the forward and the backward pass.
    """

    parameters: float
    file: float
    frozen: float
    trained: float
    gradients: float
    optimizer: float
    activations: float
    forward: float
    top: float
    bottom: float
    update: float
    flops: float

    @property
    def peak(self) -> float:
        return max(self.forward, self.top, self.bottom, self.update)

    def towards(self, other: Step, share: float) -> Step:
        """Interpolate from this step to `other` at `share` of the way; extrapolate beyond 1."""
        return Step(*(a + share * (b - a) for a, b in zip(astuple(self), astuple(other), strict=True)))


Form = tuple[torch.Size, tuple[int, ...], torch.dtype]  # all that a tensor on the meta device has, but for its memory
PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
# What an operation makes: the type of its result (or the place of the argument that it is), the forms of new tensors.
Made = tuple[type | int, list[Form]]
# By the operation and its arguments; None in place of what it makes: it must be run, as a view must. And its FLOPs.
RESULTS: dict[tuple, tuple[Made | None, int]] = {}


def form_of(t: Tensor) -> Form:
    """Return all by which two tensors on the meta device differ, but for whose memory they stand."""
    return t.shape, t.stride(), t.dtype


def key_of(argument: object) -> tuple:
    """Return what an argument of an operation contributes to its result.

    Raises:
        TypeError: that is not known.
    """
    kind = type(argument)
    if kind in PLAIN:
        return kind, argument
    if isinstance(argument, Tensor) and argument.is_meta:
        return form_of(argument)
    if isinstance(argument, (tuple, list)):
        return (kind, *map(key_of, argument))
    raise TypeError(f"{kind} is no argument by which a result is known")


def result_of(func: Callable, count: Callable | None, args: tuple, kwargs: dict) -> tuple[object, int]:
    """Return what an operation gives on the meta device, whose kernels in Python take most of a simulation's time.

    Its FLOPs are returned too, as `count`, which only products have, gives them. Layers repeat the same operations on
    the same shapes, so each is run once, and its results are then made by their form. Views are always run: they cost
    little, and share memory.
    """
    try:
        key = (func, *map(key_of, args), *((name, key_of(value)) for name, value in kwargs.items()))
    except TypeError:
        key = ()
    known, flops = RESULTS.get(key, (None, None))
    if flops is None:
        out = func(*args, **kwargs)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        if key:
            RESULTS[key] = known_result(key, args, kwargs, out), flops
        return out, flops
    if known is None:
        return func(*args, **kwargs), flops
    kind, forms = known
    if isinstance(kind, int):
        return [*args, *kwargs.values()][kind], flops
    made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in forms]
    return made[0] if kind is Tensor else kind(made), flops


def known_result(key: tuple, args: tuple, kwargs: dict, out: object) -> Made | None:
    """Return what an operation made, where that can be made again by its form alone; `key` was made before it ran."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    parts = list(out) if isinstance(out, tuple | list) else [out]
    made = [one for one in parts if isinstance(one, Tensor) and one.is_meta]
    if not made or len(made) < len(parts):
        return None
    for place, argument in enumerate([*args, *kwargs.values()]):
        if argument is out:
            same = form_of(made[0]) in (key[1 + place], key[1 + place][-1])  # a keyword's has its name before it
            return (place, []) if same else None
    if {id(t.untyped_storage()) for t in given} & {id(one.untyped_storage()) for one in made}:
        return None
    return Tensor if isinstance(out, Tensor) else type(out), list(map(form_of, made))


class Meter(TorchDispatchMode):
    """Count the bytes of all storages from their creation (or first `see`) to their deletion, and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.flops = 0
        self.storages: dict[int, weakref.ref] = {}

    def see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = id(storage), storage.nbytes()  # torch keeps one object for a storage while that lives
        if key not in self.storages:
            self.live += size
            self.peak = max(self.peak, self.live)
            self.storages[key] = weakref.ref(storage, lambda _: self.forget(key, size))

    def forget(self, key: int, size: int) -> None:
        del self.storages[key]
        self.live -= size

    def turn(self) -> int:
        """Return the peak since the last call, and start a new one."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out, flops = result_of(func, FLOPS.get(func.overloadpacket), args, kwargs or {})
        self.flops += flops
        for leaf in [out] if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        if func.namespace == "bitsandbytes" and str(func) in WITHIN:
            self.peak = max(self.peak, self.live + round(WITHIN[str(func)](out, *args)))
        return out


@contextmanager
def fused_attention() -> Iterator[None]:
    """Replace torch's attention by one that holds what fused kernels hold, until the block ends.

    The meta device would write out all scores. (A TorchFunctionMode would be off where checkpointed layers are computed
    again.)
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextmanager
def grouped_products() -> Iterator[None]:
    """Replace torch's grouped product of experts, until the block ends, by one that the meta device has in any dtype.

    A frozen weight's is as large, and as much work, as one product of all rows with the weight of a single expert.
    """
    original = F.grouped_mm

    def grouped(x: Tensor, W: Tensor, *, offs: Tensor, **more: Any) -> Tensor:
        return original(x, W, offs=offs, **more) if isinstance(W, StandIn) else x @ W[0]

    F.grouped_mm = grouped
    try:
        yield
    finally:
        F.grouped_mm = original


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Compute what torch's attention does; a boolean mask becomes one of q's dtype, again in every layer."""
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.empty_like(mask, dtype=q.dtype)
    fused = ATEN._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


class Head(torch.autograd.Function):
    """Hold what trl's fused head and loss hold: one tile of the logits at a time, and gradients summed in fp32.

    On a GPU a kernel folds the tile into the loss. On a CPU torch does, over copies of it in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, device: str) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.device = device
        for _ in Head.tiles(x, W, COPIES[device][0]):
            pass
        return x.new_empty(len(x), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        x, W = ctx.saved_tensors
        wide = Tensor.float if ctx.device == "cpu" else Tensor.detach
        wanted = zip((x, W), ctx.needs_input_grad, strict=False)
        dx, dW = (torch.zeros_like(t, dtype=torch.float32) if need else None for t, need in wanted)
        for rows, words, tile in Head.tiles(x, W, COPIES[ctx.device][1]):
            if dx is not None:
                dx[rows].addmm_(wide(tile), wide(W[words]))
            if dW is not None:
                dW[words].addmm_(wide(tile.T), wide(x[rows]))
        return None if dx is None else dx.to(x.dtype), None if dW is None else dW.to(W.dtype), None

    @staticmethod
    def tiles(x: Tensor, W: Tensor, copies: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the tiles of x Wᵀ, computed in one buffer, with `copies` bytes beside each entry."""
        tall, wide = TILE
        buffer = x.new_empty(min(len(x), tall), wide)
        for i, j in itertools.product(range(0, len(x), tall), range(0, len(W), wide)):
            rows, words = slice(i, min(i + tall, len(x))), slice(j, min(j + wide, len(W)))
            tile = buffer[: rows.stop - i, : words.stop - j]
            torch.mm(x[rows], W[words].T, out=tile)
            tile.new_empty(copies * tile.numel(), dtype=torch.uint8)
            yield rows, words, tile


def simulate(model: nn.Module, batch: int, length: int, device: str, labelled: float = 1.0) -> Step:
    """Simulate a step of a model on the meta device, after the first one: AdamW's moments exist already.

    Args:
        model: on the meta device, adapted.
        batch: sequences, of which at least one is padded, so that there is a mask.
        length: tokens of each.
        device: "cpu" or "cuda", on which the step would run.
        labelled: share of the tokens that have a label; the head sees no others.
    """
    meter = Meter()
    trained = [p for p in model.parameters() if p.requires_grad]
    for t in held_bytes(model):
        meter.see(t)
    weights = meter.live
    trained_bytes = sum(p.nbytes for p in trained)
    turns: list[int] = []

    def watch(module: nn.Module, args: object, output: object) -> None:
        hidden = tree_leaves(output)[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: turns.append(meter.turn()))

    first = [layer.register_forward_hook(watch) for layer in layers_of(model)[:1]]
    model.train()
    with meter, fused_attention(), grouped_products():
        moments = [torch.empty_like(p) for p in trained for _ in range(2)]
        before = meter.live
        ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device="meta")
        value = loss_step(model, ids, mask, device, labelled)
        kept, forward = meter.live - before, meter.turn()
        value.backward()
        flops = meter.flops
        *tops, bottom = *turns, meter.turn()
        del value, ids, mask
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    # AdamW's roots of second moments: of all tensors at once on a GPU, twice of one tensor at a time on a CPU.
    update = meter.live + (trained_bytes if device == "cuda" else 2 * max(p.nbytes for p in trained))
    model.zero_grad()
    for hook in first:
        hook.remove()
    return Step(
        count_trainable(model), saved_bytes(model), weights - trained_bytes, trained_bytes, gradients,
        sum(t.nbytes for t in moments), kept, forward, max(tops, default=bottom), bottom, update, flops,
    )  # fmt: skip


def held_bytes(model: nn.Module) -> Iterator[Tensor]:
    """Yield all tensors of a model, with those that its quantised weights carry."""
    for t in [*model.parameters(), *model.buffers()]:
        yield t
        yield from beside_step(t)


def beside_step(thing: object) -> Iterator[Tensor]:
    """Yield the scales of a quantised weight, and the scales of these."""
    for name in ("quant_state", "state2", "SCB", "absmax", "code", "offset"):
        value = vars(thing).get(name)
        if isinstance(value, Tensor):
            yield value
        elif value is not None:
            yield from beside_step(value)


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of the file that stores the trained parameters, with all that is saved beside them."""
    slots = [m.weight for m in model.modules() if isinstance(m, Slot)]
    tensors = {id(t): t for t in [*slots, *(p for p in model.parameters() if p.requires_grad)]}
    return sum(t.nbytes for t in tensors.values())


def labelled_positions(batch: int, length: int, labelled: float) -> int:
    """Return how many positions of a batch have a label, of which the first token of a sequence has none."""
    return max(1, min(round(labelled * batch * length), batch * (length - 1)))


def loss_step(model: nn.Module, ids: Tensor, mask: Tensor, device: str, labelled: float) -> Tensor:
    """Compute the loss as trl does at labelled positions.

    Args:
        model: the model.
        ids: tokens (batch × length).
        mask: of the attention (batch × 1 × length × length).
        device: "cpu" or "cuda".
        labelled: share of the tokens that have a label.
    """
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model  # any causal language model
    hidden = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    batch, length = ids.shape
    chosen = torch.empty(labelled_positions(batch, length, labelled), dtype=torch.long, device="meta")
    x = hidden.flatten(0, 1)[chosen]
    del hidden  # as a run lets it go
    return Head.apply(x, causal.get_output_embeddings().weight, device).sum()
