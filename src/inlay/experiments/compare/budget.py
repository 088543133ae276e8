"""Solve for a method's size (rank, bond, block) under a budget, by bisection on the meta device."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from inlay.experiments.compare.spec import Entry
from inlay.inspection.singular_values import target_weights
from inlay.models.loading import dtype_for
from inlay.models.sizes import count_parameters
from inlay.planning.planner import size_name, takes
from inlay.recipe.peft_methods import FULL, is_inlay, peft_size_field, without_start
from inlay.recipe.recipe import Recipe
from inlay.training.base_model import model_of
from inlay.training.batch_size import planned_step
from inlay.training.examples import Examples

Cost = Callable[[Recipe], float]


def budget_cost(kind: str, rows: Examples) -> Cost:
    """Return a function for a recipe's cost: the parameters it trains in the end, or the GiB at the peak of a step."""
    if kind == "parameters":
        return lambda recipe: count_parameters(
            recipe.base_model, without_start(recipe.adapter()), at=1.0, **model_of(recipe, rows)
        )

    def peak(recipe: Recipe) -> float:
        run, length = planned_step(recipe, recipe.base_model, rows, dtype_for(recipe.dtype))
        return run.step(int(recipe.batch_size), length).peak / 2**30

    return peak


def solve_size(entry: Entry, cost: Cost, limit: float, rows: Examples | None = None) -> Entry:
    """Return the entry at its largest size that costs at most `limit`; unchanged where a size is given or it has none.

    Raises:
        ValueError: even the smallest size costs more.
    """
    name = method_size_field(entry.recipe.method)
    if name is None or name in entry.recipe.args:
        return entry

    def sized(size: int) -> Recipe:
        return replace(entry.recipe, args={**entry.recipe.args, name: size})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about sizes that are only tried
        options = possible_sizes(entry.recipe, name, rows)
        best = largest_within(options, lambda size: cost(sized(size)), limit)
    if best is None:
        smallest = f"{name}={options[0]} costs {cost(sized(options[0])):g}"
        raise ValueError(f"{entry.name}: no {name} fits the budget of {limit:g}; {smallest}")
    return replace(entry, recipe=sized(best))


def method_size_field(method: str) -> str | None:
    """Return the hyperparameter that sets how much a method trains; None if it has none."""
    if is_inlay(method):
        return size_name(method)
    return None if method == FULL else peft_size_field(method)


def possible_sizes(recipe: Recipe, name: str, rows: Examples | None = None) -> Sequence[int]:
    """Return the sizes that a method can have on the weights it adapts, in a model for these examples."""
    where = replace(recipe, method="lora", args={"r": 1}, patterns={}, allocate="none").config()
    shapes = set(target_weights(recipe.base_model, where, **model_of(recipe, rows)).values())
    options = range(1, min(min(shape) for shape in shapes) + 1)
    if not is_inlay(recipe.method):
        return options
    configs = {size: replace(recipe, args={**recipe.args, name: size}).config() for size in options}
    return [size for size in options if all(takes(configs[size], shape) for shape in shapes)]


def largest_within(options: Sequence[int], cost: Callable[[int], float], limit: float) -> int | None:
    """Return the size with the largest cost up to `limit`, by bisection; None if all cost more.

    The cost rises with the size, or falls with it (as RandLoRA's does).
    """
    rising = options if cost(options[-1]) >= cost(options[0]) else options[::-1]
    place = bisect.bisect_right(rising, limit, key=cost)
    return rising[place - 1] if place else None
