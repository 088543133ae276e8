"""What a fine-tuning run would need, from the model's configuration alone, and the largest one that fits.

A training step is followed on the meta device (`simulate`) at two small depths, and what is affine in the number of
equal layers is continued to the whole model. The time of a step is given as its matrix products, counted as they are
called in the forward and the backward pass, over those of the frozen limit: the same model where each adapted layer
trains one number beside its weight. What else takes time (traffic, small kernels, dequantising) is not in it.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

from inlay.host.config import InlayConfig
from inlay.host.layer import adapted
from inlay.messages import first_line
from inlay.method import Base, Drop, Method, Params, keep
from inlay.methods import find
from inlay.models.base import BaseModel
from inlay.models.quantized import pack_linears
from inlay.models.sizes import count_trainable, layers_of, repeated_depths
from inlay.planning.step_simulator import Step, simulate

UNEVEN = ("patterns", "layers_to_transform", "rank_pattern", "alpha_pattern")  # what makes equal layers differ
LARGEST = 1024  # rank that is looked for
MOST = 1 << 20  # sequences in a batch


@dataclass(frozen=True, kw_only=True)
class FrozenLimit(Method):
    """The frozen limit: one trained number a layer, so that what is left is what every method pays."""

    name = "limit"
    title = "the frozen limit"
    equation = "ΔW = 0"
    paper = "none"
    trains = "b (1)"
    zero_init = True

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        return {"b": torch.zeros(1, device=W.device)}

    def delta(self, p: Params, W: Tensor) -> Tensor:
        return torch.zeros_like(W)

    def apply(self, p: Params, p0: Params | None, x: Tensor, base: Base, drop: Drop = keep) -> Tensor:
        return base(x) + p["b"].to(x.dtype)


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """What is planned: an adapter's config (None: all of the model is trained) on a model, quantised or not, trained
    as `inlay train` does on a `device`, "cpu" or "cuda".

    Raises (from any method):
        ValueError: the config does not fit the model, or the model cannot be followed without its weights.
    """

    base: BaseModel
    config: PeftConfig | None
    dtype: torch.dtype = torch.bfloat16
    quantize: str = "none"
    checkpointing: bool = False
    device: str = "cuda"

    @cached_property
    def parts(self) -> list[nn.Module]:
        """The adapted model at two depths, or whole where it does not follow from shorter ones."""
        uneven = any(getattr(self.config, name, None) for name in UNEVEN)
        depths = None if uneven else repeated_depths(self.blank())
        return [self.build(depth) for depth in depths or (None,)]

    @cached_property
    def share(self) -> float:
        """How far from the first to the last of `parts` (and beyond) the whole model lies."""
        few, more = (len(layers_of(self.parts[i])) for i in (0, -1))
        return (len(layers_of(self.blank())) - few) / (more - few) if more > few else 0.0

    def blank(self, layers: int | None = None) -> Any:
        return self.base.meta(self.dtype, layers)

    def build(self, layers: int | None) -> nn.Module:
        base = self.blank(layers)
        if self.quantize != "none":
            pack_linears(base, self.quantize, self.dtype)
        model = base if self.config is None else get_peft_model(base, copy.deepcopy(self.config))
        if self.checkpointing:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads() if self.config is not None else None
        if self.quantize != "none" and not isinstance(self.config, InlayConfig):
            for p in (p for p in model.parameters() if p.requires_grad):
                p.data = p.data.to(torch.bfloat16)  # trl does so; ours it finds fp32 again
        return model

    @cached_property
    def known(self) -> dict[tuple[int, int], Step]:
        return {}

    def step(self, batch: int, length: int) -> Step:
        """A step at `batch` sequences of `length` tokens."""
        if (batch, length) not in self.known:
            try:
                steps = [simulate(model, batch, length, self.device) for model in self.parts]
            except (RuntimeError, TypeError, AttributeError) as error:
                what = f"a step of {self.base.name} cannot be followed without its weights"
                raise ValueError(f"{what}: {first_line(error)}") from error
            self.known[batch, length] = steps[0].towards(steps[-1], self.share)
        return self.known[batch, length]

    @cached_property
    def parameters(self) -> int:
        """How many numbers are trained."""
        first, last = (count_trainable(self.parts[i]) for i in (0, -1))
        return round(first + self.share * (last - first))

    def largest_batch(self, length: int, budget: float) -> int:
        """The largest batch whose step's peak is within `budget` bytes; 0: not even one sequence."""
        fits, fails, guess = 0, MOST, 1
        points: list[tuple[int, float]] = [(0, 0.0)]
        while fails - fits > 1:
            points.append((guess, self.step(guess, length).peak))
            fits, fails = (guess, fails) if points[-1][1] <= budget else (fits, guess)
            # The peak grows along pieces of lines, so one through the last two points soon meets the budget.
            (before, low), (last, high) = points[-2:]
            slope = (high - low) / (last - before)
            ahead = last + (budget - high) / slope if slope > 0 else MOST
            guess = int(min(max(ahead, fits + 1), fails - 1)) if len(points) > 2 else 2
        return fits

    @property
    def size(self) -> int | None:
        """The rank, the size of a block, or the bond."""
        values = self.config.build() if isinstance(self.config, InlayConfig) else self.config
        return getattr(values, "bond", getattr(values, "r", None))

    def sized(self, size: int) -> PlannedRun:
        """The same with another rank."""
        if not isinstance(self.config, InlayConfig):
            return replace(self, config=replace(self.config, r=size))  # type: ignore[type-var]
        args = {**self.config.args, size_name(str(self.config.method)): size}
        return replace(self, config=replace(self.config, args=args))

    def sizes(self) -> list[int]:
        """The ranks, up to `LARGEST`, that every adapted weight takes."""
        everything = range(1, LARGEST + 1)
        if not isinstance(self.config, InlayConfig):
            return list(everything)
        layers = adapted(self.sized(1).parts[0], "default").values()
        shapes = {(layer.out_features, layer.in_features) for layer in layers}
        return [n for n in everything if all(takes(self.sized(n).config, shape) for shape in shapes)]

    def largest_size(
        self, need: Callable[[PlannedRun], float], budget: float, sizes: list[int] | None = None
    ) -> int | None:
        """The largest rank with which what a run needs is within the budget; None: none is.

        run.largest_size(lambda run: run.parameters, 1e6)
        run.largest_size(lambda run: run.step(4, 1024).peak, 24 * 2**30)
        """
        sizes = self.sizes() if sizes is None else sizes
        fit = bisect.bisect_right(sizes, budget, key=lambda n: need(self.sized(n)))
        return sizes[fit - 1] if fit else None


def size_name(method: str) -> str:
    """What a method calls its size."""
    return next(f.name for f in fields(find(method)) if f.name in ("r", "bond"))


def takes(config: Any, shape: tuple[int, int]) -> bool:
    """Whether a weight of this shape can be adapted so."""
    try:
        config.build().start(torch.empty(shape, device="meta"))
    except ValueError:
        return False
    return True
