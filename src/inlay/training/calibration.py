"""What a run looks at before its first step, where its start or its ranks come from data: its first examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from inlay.host.calibrate import calibrate, gather_statistics
from inlay.host.layer import InlayLinear
from inlay.inspection.ranks import allocated_ranks, patterns, rank_cost
from inlay.inspection.singular_values import target_weights
from inlay.method import Method
from inlay.methods.eva import EVA
from inlay.numerics.rank_allocation import blocks, by_variance
from inlay.recipe.recipe import Recipe
from inlay.training.base_model import load_training_model
from inlay.training.examples import Examples
from inlay.training.tasks import TASKS

RHO = 2  # EVA's ρ: no layer gets more than ρ r


def calibration_batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: Examples
) -> Iterator[dict[str, torch.Tensor]]:
    """At most `calibration` batches of training examples, drawn by the seed, as the task's model takes them."""
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(rows.train), generator=generator).tolist()
    size = 8 if recipe.batch_size == "auto" else recipe.batch_size
    for i in range(0, min(len(order), size * recipe.calibration), size):
        batch = TASKS[recipe.task].batch([rows.train[j] for j in order[i : i + size]], tokenizer, recipe)
        if batch is not None:
            yield batch


def start_from_data(
    recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Examples, console: Console
) -> None:
    """Give an adapter whose method starts from data its start, if it has none yet."""
    waiting = [m for m in model.modules() if isinstance(m, InlayLinear) and waits_for_data(m)]
    if waiting:
        loss = TASKS[recipe.task].loss(recipe)
        found = calibrate(model, calibration_batches(recipe, tokenizer, rows), most=recipe.calibration, loss=loss)
        console.print(f"{recipe.method} starts from {found.batches} batches of the training data")
        report_unsettled(found.unsettled, len(waiting), console)


def waits_for_data(layer: InlayLinear) -> bool:
    """Whether a layer's adapter has yet to see data."""
    cut = layer.cuts.get("default")
    return cut is not None and cut.pending and cut.method.needs is not None


def report_unsettled(unsettled: list[str], total: int, console: Console) -> None:
    """Say what had not seen enough."""
    if unsettled:
        console.print(
            f"{len(unsettled)} of {total} layers had not settled by then, the first {unsettled[0]}; --calibration "
            "gives them more batches",
            style="yellow",
        )


def settle_calibration(
    recipe: Recipe, dtype: torch.dtype, folder: Path, tokenizer: PreTrainedTokenizerBase, rows: Examples,
    console: Console,
) -> Recipe:  # fmt: skip
    """The recipe with what data allocates, explicit in `patterns`: ranks by the explained variance of each layer's
    inputs, or SMT's blocks by the model's largest scores.

    Raises:
        ValueError: the model or the data cannot be used.
    """
    if recipe.allocate not in ("variance", "blocks"):
        return recipe
    config = recipe.config()
    shapes, method = target_weights(recipe.base_model(), config), config.build()
    watched: dict[str, Method] = dict.fromkeys(shapes, method)
    if recipe.allocate == "variance":
        watched = {name: EVA(r=min(math.ceil(RHO * allocated_ranks(config)), *shape)) for name, shape in shapes.items()}
    whole = "none" if recipe.quantize == "nf4" else recipe.quantize  # it is folded afterwards, with these ranks
    base = load_training_model(replace(recipe, allocate="none", quantize=whole), dtype, folder, console)
    seen = calibration_batches(recipe, tokenizer, rows)
    found = gather_statistics(base, watched, seen, recipe.calibration, TASKS[recipe.task].loss(recipe))
    report_unsettled(found.unsettled, len(watched), console)
    if recipe.allocate == "blocks":
        budget = sum(len(method.start(torch.empty(shape, device="meta"))["D"]) for shape in shapes.values())
        shares = blocks({name: stats["score"] for name, stats in found.stats.items()}, budget)
        console.print(f"blocks by gradient: {min(shares.values())} to {max(shares.values())} a weight, {budget} in all")
        return replace(recipe, allocate="none", patterns=patterns(shares, "blocks"))
    r = allocated_ranks(config)
    ratios = {name: stats["S"].square() / stats["total"] for name, stats in found.stats.items()}
    chosen = by_variance(ratios, r, rank_cost(config, shapes))
    console.print(f"ranks by explained variance: {min(chosen.values())} to {max(chosen.values())}, {r} in the mean")
    return replace(recipe, allocate="none", patterns=patterns(chosen))
