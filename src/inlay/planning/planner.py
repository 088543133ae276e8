"""Predict what a fine-tuning run needs from the model's configuration alone, and find the largest run that fits.

`simulate` follows a training step on the meta device at two small depths, and whatever is affine in the number of equal
layers is extrapolated to the whole model. The time of a step is given as its matrix products, counted as they are
called in the forward and the backward pass, divided by those of the frozen limit: the same model where each adapted
layer trains one parameter beside its weight. Other costs (memory traffic, small kernels, dequantising) are not
included.
"""

from __future__ import annotations

import bisect
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.host.config import InlayConfig
from inlay.host.layer import adapted
from inlay.messages import first_line, installed
from inlay.method import Base, Drop, Method, Params, keep
from inlay.methods import find
from inlay.models.base import BaseModel
from inlay.models.quantized import nf4_savings, pack_linears
from inlay.models.sizes import count_trainable, layers_of, repeated_depths
from inlay.planning.step_simulator import TILE, Step, labelled_positions, simulate

UNEVEN = ("patterns", "layers_to_transform", "rank_pattern", "alpha_pattern")  # config fields that make layers differ
LARGEST = 1024  # rank that is tried
MOST = 1 << 20  # sequences in a batch


@dataclass(frozen=True, kw_only=True)
class FrozenLimit(Method):
    """Train one parameter per layer, so that what remains is the cost that every method pays."""

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


class NotPlannedError(ValueError):
    """Report a model of which a step cannot be simulated without its weights."""


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """Predict a run of `inlay train`: its steps, its parameters, and the largest batch or rank within a budget.

    Attributes:
        base: the model.
        config: of the adapter; None: the whole model is trained.
        dtype: of the base.
        quantize: as in a recipe; "none" for a base as it is.
        checkpointing: whether activations are recomputed.
        device: "cpu" or "cuda".
        labelled: share of the tokens that have a label; the head sees no others.
        like: the same run on an unquantised base, for a 4-bit one, which is then planned by its steps and the sizes of
            the weights, as it is without bitsandbytes; for any other the same run without checkpointing, whose models
            are then those of this run too.

    Raises (from any method):
        ValueError: the config does not fit the model, or the model cannot be simulated without its weights.
    """

    base: BaseModel
    config: PeftConfig | None
    dtype: torch.dtype = torch.bfloat16
    quantize: str = "none"
    checkpointing: bool = False
    device: str = "cuda"
    labelled: float = 1.0
    like: PlannedRun | None = None

    @cached_property
    def parts(self) -> list[nn.Module]:
        """Build the adapted model at two depths, or whole where it cannot be extrapolated from shorter ones.

        Where there is an unpacked run, or one like this, its models are those.
        """
        if (same := self.unpacked or self.like) is not None:
            return same.parts
        given = vars(self.config) if self.config is not None else {}
        uneven = any(map(given.get, UNEVEN)) or isinstance(given.get("experts"), dict)
        depths = None if uneven else repeated_depths(self.base.outline)
        return [self.build(depth) for depth in depths or (None,)]

    @cached_property
    def share(self) -> float:
        """Return where the whole model lies between the first (0) and the last (1) of `parts`, or beyond."""
        few, more = (len(layers_of(self.parts[i])) for i in (0, -1))
        return (len(layers_of(self.base.outline)) - few) / (more - few) if more > few else 0.0

    def blank(self, layers: int | None = None) -> PreTrainedModel:
        return self.base.meta(self.dtype, layers)

    def build(self, layers: int | None) -> nn.Module:
        base = self.blank(layers)
        if self.quantize != "none":
            pack_linears(base, self.quantize, self.dtype)
        model = base
        if self.config is not None:
            with warnings.catch_warnings():  # PEFT's LoRA names experts by itself, and warns where it finds none
                warnings.filterwarnings("ignore", r"The following \w+_pattern keys", RuntimeWarning)
                model = get_peft_model(base, copy.deepcopy(self.config))
        if self.quantize != "none" and not isinstance(self.config, InlayConfig):
            for p in (p for p in model.parameters() if p.requires_grad):
                p.data = p.data.to(torch.bfloat16)  # as trl does; Inlay's are fp32 again before a step
        return model

    @cached_property
    def unpacked(self) -> PlannedRun | None:
        """Return the same run on an unquantised base, by whose steps this one is planned, if it is."""
        if not self.quantize.startswith("nf4"):
            return None
        return self.like or (None if installed("bitsandbytes") else replace(self, quantize="none"))

    @cached_property
    def savings(self) -> tuple[float, float]:
        return nf4_savings(self.base.outline, self.dtype)

    @cached_property
    def steps(self) -> dict[tuple[int, int, float], Step]:
        return {}

    def step(self, batch: int, length: int, labelled: float | None = None) -> Step:
        """Simulate a step on `batch` sequences of `length` tokens, of which the share `labelled` has a label.

        Where there is an unpacked run, a step on a 4-bit base is that run's less what 4 bits save.
        """
        labelled = self.labelled if labelled is None else labelled
        if self.unpacked is not None:
            step, (saved, moment) = self.unpacked.step(batch, length, labelled), self.savings
            less = {name: vars(step)[name] - saved + moment for name in ("forward", "top", "bottom")}
            return replace(step, frozen=step.frozen - saved, update=step.update - saved, **less)
        if (batch, length, labelled) not in self.steps:
            try:
                steps = [self.follow(model, batch, length, labelled) for model in self.parts]
            except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
                what = f"a step of {self.base.name} cannot be simulated without its weights"
                raise NotPlannedError(f"{what}: {first_line(error)[:200]}") from error
            self.steps[batch, length, labelled] = steps[0].towards(steps[-1], self.share)
        return self.steps[batch, length, labelled]

    def follow(self, model: nn.Module, batch: int, length: int, labelled: float) -> Step:
        """Simulate a step of a model that `build` made, with checkpointing where the run has it."""
        with checkpointed(model) if self.checkpointing else nullcontext():
            return simulate(model, batch, length, self.device, labelled)

    @cached_property
    def parameters(self) -> int:
        """Return how many parameters are trained."""
        first, last = (count_trainable(self.parts[i]) for i in (0, -1))
        return round(first + self.share * (last - first))

    def largest_batch(self, length: int, budget: float) -> int:
        """Return the largest batch of sequences of `length` tokens whose step fits `budget` bytes, or 0."""
        # The smallest batch that fills a tile of the head.
        whole = min(-(-TILE[0] // labelled_positions(1, length, self.labelled)), MOST - 1)
        first = self.step(whole, length)
        fixed = first.frozen + first.trained + first.optimizer  # whatever the batch
        if fixed > budget:
            return 0
        points = [(whole, first.peak)]
        fits, fails = (whole, MOST) if first.peak <= budget else (0, whole)
        guess = int(min(max(reach((0, fixed), points[0], budget), fits + 1), fails - 1))
        while fails - fits > 1:
            points.append((guess, self.step(guess, length).peak))
            fits, fails = (guess, fails) if points[-1][1] <= budget else (fits, guess)
            # With a full tile the peak is the largest of lines: beyond two points it rises no slower than between them.
            below = sorted(point for point in points if point[0] >= whole and point[1] <= budget)[-2:]
            if len(below) == 2 and self.dtype != torch.float32 and reach(below[0], below[1], budget) < fits + 1:
                break  # in fp32 a method may take another way with more tokens
            guess = int(min(max(reach(points[-2], points[-1], budget), fits + 1), fails - 1))
        return fits

    @property
    def size(self) -> int | None:
        """Return the rank, the block size or the bond of the run's method; None if it has none."""
        if self.config is None:
            return None
        if not isinstance(self.config, InlayConfig):
            return vars(self.config).get("r")
        method = self.config.build()
        return None if method.size is None else vars(method)[method.size]

    def sized(self, size: int) -> PlannedRun:
        """Return this run with the rank, block size or bond `size`, or as it is where its method has none."""
        like = self.like and self.like.sized(size)
        if not isinstance(self.config, InlayConfig):
            return replace(self, like=like, config=replace(self.config, r=size))  # type: ignore[type-var]
        name = size_name(str(self.config.method))
        if name is None:
            return self
        args = {**self.config.args, name: size}
        return replace(self, like=like, config=replace(self.config, args=args))

    def sizes(self) -> list[int]:
        """Return the ranks, up to `LARGEST`, that every adapted weight accepts; 1 alone where there is none."""
        ranks = range(1, LARGEST + 1)
        if not isinstance(self.config, InlayConfig):
            return list(ranks)
        if self.size is None:
            return [1]
        layers = adapted(self.sized(1).parts[0], "default").values()
        shapes = {(layer.out_features, layer.in_features) for layer in layers}
        return [n for n in ranks if all(takes(self.sized(n).config, shape) for shape in shapes)]

    def largest_size(
        self, need: Callable[[PlannedRun], float], budget: float, sizes: list[int] | None = None
    ) -> int | None:
        """Return the largest rank whose run needs at most `budget`; None if no rank does.

        run.largest_size(lambda run: run.parameters, 1e6) run.largest_size(lambda run: run.step(4, 1024).peak, 24 *
        2**30)

        Args:
            need: what a run needs, in the unit of `budget`; it grows with the rank.
            budget: the limit.
            sizes: the ranks to choose from, ascending; None: `sizes()`.
        """
        sizes = self.sizes() if sizes is None else sizes
        fit = bisect.bisect_right(sizes, budget, key=lambda n: need(self.sized(n)))
        return sizes[fit - 1] if fit else None


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Let a model compute its activations again in the backward pass, until the block ends."""
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    base.gradient_checkpointing_enable()  # which also lets the embeddings' output require gradients
    try:
        yield
    finally:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()


def reach(one: tuple[int, float], other: tuple[int, float], budget: float) -> float:
    """Return where the line through two points, (batch, bytes) each, meets `budget`."""
    slope = (other[1] - one[1]) / (other[0] - one[0])
    return other[0] + (budget - other[1]) / slope if slope > 0 else MOST


def size_name(method: str) -> str | None:
    """Return the name of the hyperparameter that sets a method's size; None if it has none."""
    return find(method).size


def takes(config: Any, shape: tuple[int, int]) -> bool:
    """Return whether a weight of this `shape` can be adapted with this config."""
    try:
        config.build().start(torch.empty(shape, device="meta"))
    except ValueError:
        return False
    return True
