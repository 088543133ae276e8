"""Language modelling on plain text, in the form of WikiText: all of it is one stream, cut into blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from inlay.data.formats import Row
from inlay.data.readers import read_records
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples, announce, measured
from inlay.training.tasks.instruction import Task

JOIN = "\n\n"  # between the records: paragraphs of a file, lines of WikiText


class LanguageModelling(Task):
    """Causal language models learn every token of blocks of `max_length`; a last, shorter block is left out. Held out
    are the last blocks (`eval_size` of them), or `eval_data`."""

    def examples(self, recipe: Recipe, tokenizer: Any, console: Console) -> Examples:
        train = text_blocks(recipe, tokenizer, recipe.data, recipe.split)
        held = text_blocks(recipe, tokenizer, recipe.eval_data) if recipe.eval_data else []
        size = recipe.eval_size or (len(held) or min(100, max(1, len(train) // 10)))
        count = max(1, round(size * len(held or train)) if size < 1 else int(size))
        if held:
            held = held[:count]
        elif count >= len(train):
            raise ValueError(f"eval_size: {size} leaves none of {len(train)} blocks of {recipe.max_length} to train on")
        else:
            train, held = train[:-count], train[-count:]
        made = Examples(train, held, measured([recipe.max_length] * len(train), recipe))
        announce(made, recipe, console)
        return made

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"max_length": recipe.max_length, "packing": False, "eval_packing": False}

    def dataset(self, rows: list[Row], tokenizer: Any, recipe: Recipe) -> Dataset:
        return Dataset.from_list([{"input_ids": row["ids"], "labels": row["ids"]} for row in rows])

    def batch(self, rows: list[Row], tokenizer: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    def scores(self, row: dict[str, Any]) -> dict[str, float]:
        return {"perplexity": math.exp(min(row["eval_loss"], 700))}

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return []

    def shown(self, row: Row, tokenizer: Any, recipe: Recipe) -> str:
        return f"⟦{tokenizer.decode(row['ids'])}⟧"


def text_blocks(recipe: Recipe, tokenizer: Any, source: str, split: str | None = None) -> list[Row]:
    """A text as blocks of token ids.

    Raises:
        ValueError: it has no text column, or not two blocks of text.
    """
    records = read_records(source, split)
    column = recipe.columns.get("text", "text")
    if not all(isinstance(record.get(column), str) for record in records):
        raise ValueError(
            f"{source}: task language_modelling needs text in a column {column!r} (columns: "
            f"{', '.join(records[0])}), a .txt file, or columns: {{text: ...}}"
        )
    whole = JOIN.join(text for record in records if (text := record[column].strip("\n")))
    ids = tokenizer(text=whole, add_special_tokens=False)["input_ids"]
    n = recipe.max_length
    made = [{"ids": ids[i : i + n]} for i in range(0, len(ids) - n + 1, n)]
    if len(made) < (1 if source == recipe.eval_data else 2):
        raise ValueError(f"{source}: {len(ids)} tokens are too few for blocks of max_length={n}; lower it")
    return made
