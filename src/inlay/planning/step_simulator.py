"""One training step, followed without doing it: the real code runs on tensors that have shapes but no memory.

What `inlay train` does in a step (trl's loss, the backward pass, torch's AdamW) is run on the meta device, and every
tensor is counted from its birth to its death, so nothing here knows what any method or model keeps. What a kernel
needs for itself is not seen. Two things would not run there as on a device and have a stand-in: attention, and the
head with its loss.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator
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
from inlay.models.meta import count_trainable, layers_of

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


# Bytes that live only within one of bitsandbytes' operations: a dequantised weight with its scales, sums in 32 bits.
WITHIN = {
    "bitsandbytes.gemm_4bit.default": lambda made, x, W, shape, *_: math.prod(shape) * (x.element_size() + 4 / 64),
    "bitsandbytes.int8_scaled_mm.default": lambda made, *_: 4 * made.numel(),
}

TILE = (4096, 32768)  # tokens and words
COPIES = {"cpu": (13, 29), "cuda": (0, 0)}  # bytes beside each number of a tile, forward and backward


@dataclass(frozen=True)
class Step:
    """What a step trains, holds (in bytes) and computes. Every field is affine in the number of equal layers.

    Attributes:
        parameters: numbers trained.
        file: the adapter as saved (all of the model where all of it is trained).
        frozen: weights and buffers that are not trained, θ₀ among them.
        trained: what is trained.
        gradients: of what is trained.
        optimizer: AdamW's moments.
        activations: kept from the forward pass for the backward pass.
        forward, top, bottom, update: the most that is live at once in the forward pass and the loss, in the backward
            pass down to the first layer, in that layer, and while the optimiser steps.
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
        """The step that lies at `share` of the way to another one (beyond it, from 1 on)."""
        return Step(*(a + share * (b - a) for a, b in zip(astuple(self), astuple(other), strict=True)))


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that are born while it is on (or are shown to it) until they die, and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.known: dict[int, weakref.ref] = {}

    def see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = id(storage), storage.nbytes()  # torch keeps one object for a storage while that lives
        if key not in self.known:
            self.live += size
            self.peak = max(self.peak, self.live)
            self.known[key] = weakref.ref(storage, lambda _: self.forget(key, size))

    def forget(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size

    def turn(self) -> int:
        """The peak since the last turn."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(t, Tensor):
                self.see(t)
        if str(func) in WITHIN:
            self.peak = max(self.peak, self.live + round(WITHIN[str(func)](made, *args)))
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=made)
        return made


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as the fused kernels of CPUs and GPUs hold it; the meta device would write out all scores. (A
    TorchFunctionMode would be off where checkpointed layers are computed again.)"""
    own, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As torch's: a mask of booleans becomes one of q's dtype, in every layer anew."""
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.empty_like(mask, dtype=q.dtype)
    fused = ATEN._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


class Head(torch.autograd.Function):
    """What trl's fused head and loss hold: a tile of the logits, never all of them; gradients are summed in fp32.

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
        """The tiles of x Wᵀ, in one buffer."""
        tall, wide = TILE
        buffer = x.new_empty(min(len(x), tall), wide)
        for i, j in itertools.product(range(0, len(x), tall), range(0, len(W), wide)):
            rows, words = slice(i, min(i + tall, len(x))), slice(j, min(j + wide, len(W)))
            tile = buffer[: rows.stop - i, : words.stop - j]
            torch.mm(x[rows], W[words].T, out=tile)
            tile.new_empty(copies * tile.numel(), dtype=torch.uint8)
            yield rows, words, tile


def simulate(model: nn.Module, batch: int, length: int, device: str) -> Step:
    """A step of a model on the meta device as it would be on a `device`, "cpu" or "cuda", at `batch` sequences of
    `length` tokens, of which one at least is padded, so that there is a mask. Not the first step: the moments are
    there.
    """
    meter, trained = Meter(), [p for p in model.parameters() if p.requires_grad]
    for t in held_bytes(model):
        meter.see(t)
    weights, own = meter.live, sum(p.nbytes for p in trained)
    turns: list[int] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        hidden = tree_leaves(output)[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: turns.append(meter.turn()))

    first = [layer.register_forward_hook(watch) for layer in layers_of(model)[:1]]
    model.train()
    with meter, fused_attention():
        moments = [torch.empty_like(p) for p in trained for _ in range(2)]
        before = meter.live
        ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device="meta")
        value = loss_step(model, ids, mask, device)
        kept, forward = meter.live - before, meter.turn()
        value.backward()
        flops = meter.flops
        *tops, bottom = *turns, meter.turn()
        del value, ids, mask
    gradients = meter.live - before
    # The roots of the second moments: of all tensors at once on a GPU, two copies of one after the other on a CPU.
    update = meter.live + (own if device == "cuda" else 2 * max(p.nbytes for p in trained))
    model.zero_grad()
    for hook in first:
        hook.remove()
    return Step(
        count_trainable(model), saved_bytes(model), weights - own, own, gradients, sum(t.nbytes for t in moments), kept,
        forward, max(tops, default=bottom), bottom, update, flops,
    )  # fmt: skip


def held_bytes(model: nn.Module) -> Iterator[Tensor]:
    """All tensors of a model, and what a quantised weight has beside itself."""
    for t in [*model.parameters(), *model.buffers()]:
        yield t
        yield from beside_step(t)


def beside_step(thing: Any) -> Iterator[Tensor]:
    """The scales of a quantised weight, and theirs."""
    for name in ("quant_state", "state2", "SCB", "absmax", "code", "offset"):
        value = vars(thing).get(name)
        if isinstance(value, Tensor):
            yield value
        elif value is not None:
            yield from beside_step(value)


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the file with what is trained, and with what belongs to it."""
    slots = [m.weight for m in model.modules() if isinstance(m, Slot)]
    tensors = {id(t): t for t in [*slots, *(p for p in model.parameters() if p.requires_grad)]}
    return sum(t.nbytes for t in tensors.values())


def loss_step(model: nn.Module, ids: Tensor, mask: Tensor, device: str) -> Tensor:
    """The loss that trl computes; ids (batch × length), mask (batch × 1 × length × length)."""
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    x = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    return Head.apply(x, causal.get_output_embeddings().weight, device).sum()
