"""The size (rank, bond, block) of a method for a budget, by bisection on the meta device: no weight is loaded."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch

from inlay.methods import find
from inlay.workbench import memory, models, peft_methods, prepare, spectra
from inlay.workbench.comparison import Entry
from inlay.workbench.prepare import Examples
from inlay.workbench.recipe import Recipe

Cost = Callable[[Recipe], float]


def cost_of(kind: str, rows: Examples) -> Cost:
    """What a recipe costs of a budget: its trained numbers, or the GiB of a step as they are counted."""
    if kind == "parameters":
        return lambda recipe: memory.count(recipe.model, recipe.adapter())

    def need(recipe: Recipe) -> float:
        model, length = prepare.planned(recipe, rows, models.dtype_for(recipe.dtype))
        return memory.estimate(model, int(recipe.batch_size), length, recipe.quantize).total / 2**30

    return need


def solve(entry: Entry, cost: Cost, limit: float) -> Entry:
    """The entry at its largest size that costs at most `limit`; unchanged where a method has no size.

    Raises:
        ValueError: even the smallest costs more.
    """
    name = size_name(entry.recipe.method)
    if name is None:
        return entry

    def sized(size: int) -> Recipe:
        return replace(entry.recipe, args={**entry.recipe.args, name: size})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of sizes that are only tried
        options = sizes(entry.recipe, name)
        best = largest(options, lambda size: cost(sized(size)), limit)
    if best is None:
        least = f"{name}={options[0]} costs {cost(sized(options[0])):g}"
        raise ValueError(f"{entry.name}: no {name} fits the budget of {limit:g}; {least}")
    return replace(entry, recipe=sized(best))


def size_name(method: str) -> str | None:
    """The hyperparameter that sets how much a method trains."""
    if not peft_methods.is_ours(method):
        return None if method == peft_methods.FULL else peft_methods.size_field(method)
    return next((f.name for f in fields(find(method)) if f.name in ("r", "bond")), None)


def sizes(recipe: Recipe, name: str) -> Sequence[int]:
    """The sizes that a method can have on the weights it adapts: for ours, those it takes there."""
    where = replace(recipe, method="lora", args={"r": 1}, patterns={}, allocate="none").config()
    shapes = set(spectra.targets(recipe.model, where, recipe.trust_remote_code).values())
    least = min(min(shape) for shape in shapes)
    if not peft_methods.is_ours(recipe.method):
        return range(1, least + 1)
    weights = [torch.empty(shape, device="meta") for shape in shapes]
    return [size for size in range(1, least + 1) if takes(replace(recipe, args={**recipe.args, name: size}), weights)]


def takes(recipe: Recipe, weights: list[torch.Tensor]) -> bool:
    """Whether a method has a start on all of the weights."""
    try:
        method = recipe.config().build()
        return all(method.start(weight) is not None for weight in weights)
    except ValueError:
        return False


def largest(options: Sequence[int], cost: Callable[[int], float], limit: float) -> int | None:
    """Of sizes in order, the one with the largest cost that is not above the limit, by bisection: the cost rises with
    the size, or falls with it (RandLoRA's does); None where all are above."""
    rising = options if cost(options[-1]) >= cost(options[0]) else options[::-1]
    place = bisect.bisect_right(rising, limit, key=cost)
    return rising[place - 1] if place else None
