"""Instruction tuning, and with it what every other task may do differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from inlay.data.chats import answer_text
from inlay.data.formats import Row
from inlay.data.render import IGNORED, render
from inlay.evaluation.generate import answer
from inlay.models.model_classes import find_model_class
from inlay.models.scored_positions import logits_at
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples, load_examples, token_dataset
from inlay.training.run_tokenizer import run_tokenizer
from inlay.training.trainers.trainer import Trainer

Loss = Callable[[Any, Any], Tensor]  # of a model and a batch
Settings = dict[str, Any]  # of a trainer, its arguments or a model's configuration, by name


class Task:
    """Train causal language models on answers to prompts, through trl's SFTTrainer."""

    trainer: type = Trainer
    arguments: type = SFTConfig
    metrics: tuple[str, ...] = ()  # what evaluation gives beside the loss

    def processor(self, recipe: Recipe) -> Any:
        """Return what turns the data into numbers: a tokenizer."""
        return run_tokenizer(recipe)

    def examples(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
        """Read, split and audit a recipe's data."""
        return load_examples(recipe, tokenizer, console)

    def model_settings(self, rows: Examples) -> Settings:
        """Return what of the model's configuration depends on the data."""
        return {}

    def settings(self, recipe: Recipe) -> Settings:
        """Return the trainer's arguments that are not transformers' own."""
        return {
            "max_length": recipe.max_length,
            "packing": recipe.packing,
            "eval_packing": False,
            "remove_unused_columns": False,  # of `token_dataset` all are used
        }

    def dataset(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
        """Return examples as the trainer takes them."""
        return token_dataset(rows, tokenizer)

    def batch(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, Tensor] | None:
        """Return examples as the model and `loss` take them, for starts from data; None if nothing is learned."""
        shown = [render(row, tokenizer, recipe.max_length) for row in rows]
        return collate([(one.ids, one.labels) for one in shown if one.answer_ids], tokenizer)

    def loss(self, recipe: Recipe) -> Loss | None:
        """Return what of (model, batch) such starts differentiate; None: the model's own loss."""
        if not find_model_class(recipe.task).causal:
            return None
        return lambda model, batch: label_losses(model, batch)[1].mean()

    def parts(self, tokenizer: PreTrainedTokenizerBase, rows: Examples, recipe: Recipe) -> Settings:
        """Return arguments of the trainer itself: a collator, metrics."""
        return {}

    def scores(self, row: dict[str, Any]) -> dict[str, float]:
        """Return the metrics in a row of an evaluation."""
        return {name: row[f"eval_{name}"] for name in self.metrics if f"eval_{name}" in row}

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        """Return held-out examples to answer before and after: "input" for `answers`; "prompt", "reference" to show."""
        asked = [row for row in rows if "prompt" in row][:count]
        return [
            {"input": row, "prompt": row["prompt"][-1]["content"], "reference": answer_text(row["completion"][0])}
            for row in asked
        ]

    def answers(self, model: Any, tokenizer: PreTrainedTokenizerBase, inputs: list[Any]) -> list[str]:
        """Return the model's answers to the "input" of questions."""
        return answer(model, tokenizer, inputs)

    def shown(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
        """Return an example as text, what is learned from in ⟦⟧."""
        return render(row, tokenizer, recipe.max_length).marked(tokenizer)


def label_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return which tokens after the first are labelled, (rows, length - 1), and the loss of each of them."""
    labels = batch["labels"][:, 1:]
    labelled = labels != IGNORED
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = logits_at(model, pad(labelled, (0, 1)), **inputs)
    return labelled, cross_entropy(logits.float(), labels[labelled], reduction="none")


def collate(rows: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor] | None:
    """Return tokens and labels of rows as one batch, filled up on the right."""
    if not rows:
        return None
    length, filler = max(len(ids) for ids, _ in rows), cast("int", tokenizer.pad_token_id or 0)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in rows:
        rest = length - len(ids)
        columns["input_ids"].append([*ids, *[filler] * rest])
        columns["attention_mask"].append([1] * len(ids) + [0] * rest)
        columns["labels"].append([*labels, *[IGNORED] * rest])
    return {key: torch.tensor(column) for key, column in columns.items()}
