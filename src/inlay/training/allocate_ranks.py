"""Allocate a recipe's ranks by the spectra of its model's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console

from inlay.host.config import InlayConfig
from inlay.inspection.ranks import allocated_ranks, inspection, patterns, rank_cost
from inlay.inspection.singular_values import target_weights, weight_spectra
from inlay.models.base import BaseModel
from inlay.numerics.rank_allocation import Direction, by_threshold
from inlay.recipe.recipe import Recipe
from inlay.training.base_model import model_of
from inlay.training.examples import Examples


def thresholded(config: InlayConfig, base: BaseModel, console: Console, **model: Any) -> dict[str, int]:
    """Return WeLore's ranks of the weights that a config adapts."""
    shapes = target_weights(base, config, **model)
    values = weight_spectra(base, shapes, **model)
    r, cost = allocated_ranks(config), rank_cost(config, shapes)
    ranks = by_threshold(values, r, cost)
    parameters = sum(cost(name, rank) for name, rank in ranks.items())
    uniform = sum(cost(name, r) for name in ranks)
    console.print(
        f"ranks by threshold (WeLore): {min(ranks.values())} to {max(ranks.values())}, {parameters:,} parameters; "
        f"r = {r} everywhere: {uniform:,}"
    )
    return ranks


def settle_ranks(recipe: Recipe, base: BaseModel, rows: Examples, console: Console) -> Recipe:
    """Return the recipe with its ranks allocated, written out in `patterns`.

    So it runs again, and its adapter loads, without any spectra. The examples settle the head of a classifier.

    Raises:
        ValueError: the model cannot be read, or does not fit the recipe.
    """
    if recipe.allocate in ("none", "variance", "blocks"):  # these need data: `calibration.settle_calibration`
        return recipe
    config, model = recipe.config(), model_of(recipe, rows)
    if recipe.allocate == "welore":
        return replace(recipe, allocate="none", patterns=patterns(thresholded(config, base, console, **model)))
    direction: Direction = "peaked" if recipe.allocate == "energy_peaked" else "flat"
    spectra = inspection(base, config, direction, **model)
    console.print(spectra.summary())
    return replace(recipe, allocate="none", patterns=patterns(spectra.ranks))
