"""Allocate a recipe's ranks by the spectra of its model's weights."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from inlay.inspection.ranks import allocated_ranks, inspection, patterns, rank_cost
from inlay.inspection.singular_values import target_weights, weight_spectra
from inlay.models.base import BaseModel
from inlay.numerics.rank_allocation import Direction, by_threshold
from inlay.recipe.recipe import Recipe


def thresholded(recipe: Recipe, base: BaseModel, console: Console) -> dict[str, int]:
    """Return WeLore's ranks of a recipe's modules."""
    config = recipe.config()
    shapes = target_weights(base, config)
    values = weight_spectra(base, shapes)
    r, cost = allocated_ranks(config), rank_cost(config, shapes)
    ranks = by_threshold(values, r, cost)
    parameters = sum(cost(name, rank) for name, rank in ranks.items())
    uniform = sum(cost(name, r) for name in ranks)
    console.print(
        f"ranks by threshold (WeLore): {min(ranks.values())} to {max(ranks.values())}, {parameters:,} parameters; "
        f"r = {r} everywhere: {uniform:,}"
    )
    return ranks


def settle_ranks(recipe: Recipe, base: BaseModel, console: Console) -> Recipe:
    """Return the recipe with its ranks allocated, written out in `patterns`.

    So it runs again, and its adapter loads, without any spectra.

    Raises:
        ValueError: the model cannot be read, or does not fit the recipe.
    """
    if recipe.allocate in ("none", "variance", "blocks"):  # these need data: `calibration.settle_calibration`
        return recipe
    if recipe.allocate == "welore":
        return replace(recipe, allocate="none", patterns=patterns(thresholded(recipe, base, console)))
    direction: Direction = "peaked" if recipe.allocate == "energy_peaked" else "flat"
    spectra = inspection(base, recipe.config(), direction)
    console.print(spectra.summary())
    return replace(recipe, allocate="none", patterns=patterns(spectra.ranks))
