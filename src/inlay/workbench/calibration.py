"""What a run looks at before its first step, where its start or its ranks come from data: its first examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from inlay.allocate import by_variance
from inlay.host.calibrate import calibrate, gather
from inlay.host.layer import InlayLinear
from inlay.methods.eva import EVA
from inlay.workbench import data, ranks, spectra
from inlay.workbench.prepare import Examples, load
from inlay.workbench.recipe import Recipe

RHO = 2  # EVA's ρ: no layer gets more than ρ r


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: Examples) -> Iterator[dict[str, torch.Tensor]]:
    """At most `calibration` batches of training examples, drawn by the seed, as a model and its loss take them."""
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(rows.train), generator=generator).tolist()
    size = 8 if recipe.batch_size == "auto" else recipe.batch_size
    for i in range(0, min(len(order), size * recipe.calibration), size):
        shown = [data.render(rows.train[j], tokenizer, recipe.max_length) for j in order[i : i + size]]
        pairs = [(one.prompt_ids, one.answer_ids) for one in shown if one.answer_ids]
        if pairs:
            yield collate(pairs, cast(int, tokenizer.pad_token_id or 0))


def collate(pairs: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Prompts and answers as one batch, filled up on the right; the loss is of the answers."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in pairs:
        rest = length - len(prompt) - len(answer)
        columns["input_ids"].append([*prompt, *answer, *[pad] * rest])
        columns["attention_mask"].append([1] * (length - rest) + [0] * rest)
        columns["labels"].append([-100] * len(prompt) + answer + [-100] * rest)
    return {key: torch.tensor(column) for key, column in columns.items()}


def start(recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Examples, console: Console) -> None:
    """Give an adapter whose method starts from data its start, if it has none yet."""
    waiting = [m for m in model.modules() if isinstance(m, InlayLinear) and waits(m)]
    if waiting:
        found = calibrate(model, batches(recipe, tokenizer, rows), most=recipe.calibration)
        console.print(f"{recipe.method} starts from {found.batches} batches of the training data")
        report(found.unsettled, len(waiting), console)


def waits(layer: InlayLinear) -> bool:
    """Whether a layer's adapter has yet to see data."""
    cut = layer.cuts.get("default")
    return cut is not None and cut.pending and cut.method.needs is not None


def report(unsettled: list[str], total: int, console: Console) -> None:
    """Say what had not seen enough."""
    if unsettled:
        console.print(
            f"{len(unsettled)} of {total} layers had not settled by then, the first {unsettled[0]}; --calibration "
            "gives them more batches",
            style="yellow",
        )


def settle(
    recipe: Recipe, dtype: torch.dtype, folder: Path, tokenizer: PreTrainedTokenizerBase, rows: Examples,
    console: Console,
) -> Recipe:  # fmt: skip
    """The recipe with its ranks allocated by the explained variance of each layer's inputs, explicit in `patterns`.

    Raises:
        ValueError: the model or the data cannot be used.
    """
    if recipe.allocate != "variance":
        return recipe
    config = recipe.config()
    r, shapes = ranks.rank_of(config), spectra.targets(recipe.model, config, recipe.trust_remote_code)
    watched = {name: EVA(r=min(math.ceil(RHO * r), *shape)) for name, shape in shapes.items()}
    whole = "none" if recipe.quantize == "nf4" else recipe.quantize  # it is folded afterwards, with these ranks
    base = load(replace(recipe, allocate="none", quantize=whole), dtype, folder, console)
    found = gather(base, watched, batches(recipe, tokenizer, rows), recipe.calibration)
    ratios = {name: stats["S"].square() / stats["total"] for name, stats in found.stats.items()}
    chosen = by_variance(ratios, r, ranks.cost_of(config, shapes))
    console.print(f"ranks by explained variance: {min(chosen.values())} to {max(chosen.values())}, {r} in the mean")
    report(found.unsettled, len(watched), console)
    return replace(recipe, allocate="none", patterns=ranks.patterns(chosen))
