"""Compute starts and ranks that depend on data, from a run's first examples, before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console

from inlay.host.calibrate import Calibration, calibrate, gather_statistics, watched_experts
from inlay.host.experts import InlayExperts
from inlay.host.layer import InlayLinear, adapted
from inlay.host.routing import busiest_experts, routed_tokens
from inlay.inspection.ranks import allocated_ranks, patterns, rank_cost
from inlay.inspection.singular_values import target_weights
from inlay.method import Method
from inlay.methods.eva import EVA
from inlay.numerics.rank_allocation import allocate_blocks, by_variance
from inlay.recipe.recipe import Recipe
from inlay.training.base_model import load_training_model, model_of
from inlay.training.prepared import Prepared
from inlay.training.tasks import TASKS

RHO = 2  # EVA's ρ: a layer's rank is at most ρ r


def calibration_batches(prepared: Prepared) -> Iterator[dict[str, torch.Tensor]]:
    """Yield at most `calibration` batches of training examples, drawn by the seed, as the task's model takes them."""
    recipe, rows = prepared.recipe, prepared.rows
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(rows.train), generator=generator).tolist()
    size = 8 if recipe.batch_size == "auto" else recipe.batch_size
    for i in range(0, min(len(order), size * recipe.calibration), size):
        batch = TASKS[recipe.task].batch([rows.train[j] for j in order[i : i + size]], prepared.tokenizer, recipe)
        if batch is not None:
            yield batch


def start_from_data(prepared: Prepared, model: Any) -> None:
    """Compute the start of an adapter whose method starts from data, unless it has one."""
    waiting = [m for m in model.modules() if isinstance(m, InlayLinear) and waits_for_data(m)]
    if waiting:
        recipe = prepared.recipe
        loss = TASKS[recipe.task].loss(recipe)
        result = calibrate(model, calibration_batches(prepared), most=recipe.calibration, loss=loss)
        prepared.console.print(f"{recipe.method} starts from {result.batches} batches of the training data")
        report_unsettled(result.unsettled, len(waiting), prepared.console)


def waits_for_data(layer: InlayLinear) -> bool:
    """Return whether a layer's adapter has yet to see data."""
    cut = layer.cuts.get("default")
    return cut is not None and cut.pending and cut.method.needs is not None


def settle_experts(prepared: Prepared) -> Recipe:
    """Return the recipe with the experts written out where it says how many of each layer are trained: the busiest.

    Raises:
        ValueError: the model or the data cannot be used.
    """
    recipe = prepared.recipe
    if isinstance(recipe.experts, bool | dict):
        return recipe
    base = load_training_model(replace(prepared, recipe=replace(recipe, allocate="none", experts=False)))
    counts = routed_tokens(base, calibration_batches(prepared), recipe.calibration)
    chosen = busiest_experts(counts, recipe.experts)
    routed = sum(own.sum().item() for own in counts.values())
    kept = sum(counts[name][own].sum().item() for name, own in chosen.items())
    prepared.console.print(
        f"{recipe.experts} experts of each layer are trained, which get {kept / routed:.0%} of the tokens"
    )
    return replace(recipe, experts=chosen)


def report_unsettled(unsettled: list[str], total: int, console: Console) -> None:
    """Print how many layers had not seen enough data."""
    if unsettled:
        console.print(
            f"{len(unsettled)} of {total} layers had not settled by then, the first is {unsettled[0]}; --calibration "
            "gives them more batches",
            style="yellow",
        )


def settle_calibration(prepared: Prepared) -> Recipe:
    """Return the recipe with what data allocates, written out in `patterns`.

    These are ranks by the explained variance of each layer's inputs, or SMT's blocks by the model's largest scores.

    Raises:
        ValueError: the model or the data cannot be used.
    """
    recipe, console = prepared.recipe, prepared.console
    if recipe.allocate not in ("variance", "blocks"):
        return recipe
    config = recipe.config()
    shapes = target_weights(prepared.base, config, **model_of(recipe, prepared.rows))
    method = config.build()
    watched: dict[str, Method] = dict.fromkeys(shapes, method)
    if recipe.allocate == "variance":
        watched = {name: EVA(r=min(math.ceil(RHO * allocated_ranks(config)), *shape)) for name, shape in shapes.items()}
    gathered = gather_by_weight(prepared, watched)
    report_unsettled(gathered.unsettled, len(watched), console)
    if recipe.allocate == "blocks":
        budget = sum(len(method.start(torch.empty(shape, device="meta"))["D"]) for shape in shapes.values())
        blank = {name: method.statistic(torch.zeros(shape))["score"] for name, shape in shapes.items()}
        scores = {name: gathered.stats[name].get("score", blank[name]) for name in shapes}
        shares = allocate_blocks(scores, budget)
        console.print(
            f"blocks by gradient: {min(shares.values())} to {max(shares.values())} a weight, {budget} in total"
        )
        return replace(recipe, allocate="none", patterns=patterns(shares, "blocks"))
    r = allocated_ranks(config)
    ratios = {
        name: stats["S"][: math.ceil(RHO * r)].square() / stats["total"] if stats else torch.zeros(1)
        for name, stats in gathered.stats.items()
    }
    ranks = by_variance(ratios, r, rank_cost(config, shapes))
    console.print(f"ranks by explained variance: {min(ranks.values())} to {max(ranks.values())}, {r} on average")
    return replace(recipe, allocate="none", patterns=patterns(ranks))


def gather_by_weight(prepared: Prepared, methods: dict[str, Method]) -> Calibration:
    """Return the statistics that `methods` need of a recipe's weights, which go by their names in `patterns`.

    The model is loaded for it. An expert that no row is routed to has none.
    """
    recipe = prepared.recipe
    quantize = "none" if recipe.quantize == "nf4" else recipe.quantize  # the fold comes later, with these ranks
    plain = replace(recipe, allocate="none", quantize=quantize)
    base = load_training_model(replace(prepared, recipe=plain))
    where = replace(plain, method="lora", args={"r": 1}, scale=None)  # which only says which weights these are
    model = get_peft_model(base, where.config())  # type: ignore[arg-type]
    layers = adapted(model, "default")
    names: dict[str, str] = {}
    for path, layer in layers.items():
        module = layer.cuts["default"].module
        experts = isinstance(layer, InlayExperts)
        names |= {f"{path}.{part}": f"{module}.{e}" if experts else module for e, part in enumerate(layer.seen)}
    watched = {path: methods[name] for path, name in names.items() if name in methods}
    batches, loss = calibration_batches(prepared), TASKS[recipe.task].loss(recipe)
    with watched_experts(layers.values()):
        seen = gather_statistics(model, watched, batches, recipe.calibration, loss)
    stats = {names[path]: own for path, own in seen.stats.items()}
    return Calibration(seen.batches, {name: stats[name] for name in methods}, [names[path] for path in seen.unsettled])
