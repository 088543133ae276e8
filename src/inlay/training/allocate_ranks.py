"""A recipe's ranks, settled by the spectra of its model's weights."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from inlay.inspection.ranks import allocated_ranks, inspection, patterns, rank_cost
from inlay.inspection.singular_values import target_weights, weight_spectra
from inlay.numerics.rank_allocation import Direction, by_threshold
from inlay.recipe.recipe import Recipe


def thresholded(recipe: Recipe, console: Console) -> dict[str, int]:
    """WeLore's ranks of a recipe's modules."""
    config = recipe.config()
    base = recipe.base_model()
    shapes = target_weights(base, config)
    values = weight_spectra(base, shapes)
    r, cost = allocated_ranks(config), rank_cost(config, shapes)
    found = by_threshold(values, r, cost)
    numbers, uniform = (sum(cost(n, rank) for n, rank in each.items()) for each in (found, dict.fromkeys(found, r)))
    console.print(
        f"ranks by threshold (WeLore): {min(found.values())} to {max(found.values())}, {numbers:,} numbers; "
        f"r = {r} everywhere: {uniform:,}"
    )
    return found


def settle_ranks(recipe: Recipe, console: Console) -> Recipe:
    """The recipe with its ranks allocated: explicit in `patterns`, so that it runs again, and its adapter loads,
    without any spectra.

    Raises:
        ValueError: the model cannot be read, or does not fit the recipe.
    """
    if recipe.allocate in ("none", "variance", "blocks"):  # these wait for data: `calibration.settle`
        return recipe
    if recipe.allocate == "welore":
        return replace(recipe, allocate="none", patterns=patterns(thresholded(recipe, console)))
    direction: Direction = "peaked" if recipe.allocate == "energy_peaked" else "flat"
    found = inspection(recipe.base_model(), recipe.config(), direction)
    console.print(found.summary())
    return replace(recipe, allocate="none", patterns=patterns(found.ranks))
