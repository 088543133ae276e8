"""Language modelling on plain text, in the form of WikiText: all of it is one stream, cut into blocks."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from inlay.data.formats import Row, Rules, convert_all, text_cell
from inlay.data.records import Record
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples, announce, measured
from inlay.training.mixture import train_and_heldout
from inlay.training.run_tokenizer import check_limits
from inlay.training.tasks.instruction import Settings, Task

JOIN = "\n\n"  # between the records: paragraphs of a file, lines of WikiText


class LanguageModelling(Task):
    """Train causal language models on every token of blocks of `max_length`; a last, shorter block is left out.

    The last blocks are held out (`eval_size` of them), or `eval_data` is.
    """

    def examples(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
        def convert(records: list[Record], rules: Rules) -> list[Row]:
            return text_blocks(records, rules, tokenizer, recipe.max_length)

        blocks, held = train_and_heldout(recipe, convert, console, cut=lambda parts: last_blocks(parts, recipe))
        largest = max(max(row["ids"]) for row in (*blocks, *held))
        check_limits(recipe, tokenizer, largest, recipe.max_length)
        made = Examples(blocks, held, measured([recipe.max_length] * len(blocks), recipe))
        announce(made, recipe, console)
        return made

    def settings(self, recipe: Recipe) -> Settings:
        return {"max_length": recipe.max_length, "packing": False, "eval_packing": False}

    def dataset(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
        return Dataset.from_list([{"input_ids": row["ids"], "labels": row["ids"]} for row in rows])

    def batch(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    def scores(self, row: dict[str, Any]) -> dict[str, float]:
        return {"perplexity": math.exp(min(row["eval_loss"], 700))}

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return []

    def shown(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
        return f"⟦{tokenizer.decode(row['ids'])}⟧"


def text_blocks(records: list[Record], rules: Rules, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Row]:
    """Return a text as blocks of `length` token ids.

    Raises:
        ValueError: it has no text column, or not a block of text.
    """

    def row(record: Record, roles: dict[str, str]) -> list[Row]:
        cell = record[roles["text"]]
        return [] if cell is None else [{"text": text_cell(cell, roles["text"]).strip("\n")}]

    texts = convert_all(records, rules, {"text": {"text": ("text",)}}, row)
    ids = tokenizer(text=JOIN.join(one["text"] for one in texts if one["text"]), add_special_tokens=False)["input_ids"]
    made = [{"ids": ids[i : i + length]} for i in range(0, len(ids) - length + 1, length)]
    if not made:
        raise ValueError(f"{rules.source}: {len(ids)} tokens are too few for blocks of max_length={length}; lower it")
    return made


def last_blocks(parts: list[list[Row]], recipe: Recipe) -> tuple[list[list[Row]], list[Row]]:
    """Return the blocks of all sources without those held out, and these: the last of each, by its share of all."""
    total = sum(map(len, parts))
    size = recipe.eval_size or min(100, max(1, total // 10))
    count = max(1, round(size * total) if size < 1 else int(size))
    if count >= total:
        raise ValueError(f"eval_size: {size} leaves none of {total} blocks of {recipe.max_length} to train on")
    ends = [round(count * sum(map(len, parts[:i])) / total) for i in range(len(parts) + 1)]
    counts = [end - start for start, end in pairwise(ends)]
    held = [row for part, own in zip(parts, counts, strict=True) for row in part[len(part) - own :]]
    return [part[: len(part) - own] for part, own in zip(parts, counts, strict=True)], held
