"""Instruction tuning, and with it what every other task may do differently."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from rich.console import Console
from trl import SFTConfig

from inlay.workbench import data, models, prepare
from inlay.workbench.generate import answer
from inlay.workbench.prepare import Examples
from inlay.workbench.recipe import Recipe
from inlay.workbench.trainer import Trainer

Row = dict[str, Any]


class Task:
    """Causal language models learn answers to prompts, through trl's SFTTrainer."""

    trainer: type = Trainer
    arguments: type = SFTConfig
    metrics: tuple[str, ...] = ()  # what evaluation gives beside the loss

    def processor(self, recipe: Recipe) -> Any:
        """What makes numbers of the data: a tokenizer."""
        return models.load_tokenizer(recipe.model, recipe.revision, recipe.trust_remote_code)

    def examples(self, recipe: Recipe, tokenizer: Any, console: Console) -> Examples:
        """Read, split and audit a recipe's data."""
        return prepare.examples(recipe, tokenizer, console)

    def model_settings(self, rows: Examples) -> dict[str, Any]:
        """What of the model's configuration depends on the data."""
        return {}

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """The trainer's arguments that are not transformers' own."""
        return {"max_length": recipe.max_length, "packing": recipe.packing, "eval_packing": False}

    def dataset(self, rows: list[Row], tokenizer: Any, recipe: Recipe) -> Dataset:
        """Examples as the trainer takes them."""
        return prepare.as_dataset(rows, tokenizer)

    def parts(self, tokenizer: Any, rows: Examples) -> dict[str, Any]:
        """Arguments of the trainer itself: a collator, metrics."""
        return {}

    def scores(self, row: dict[str, Any]) -> dict[str, float]:
        """The metrics in a row of an evaluation."""
        return {name: row[f"eval_{name}"] for name in self.metrics if f"eval_{name}" in row}

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        """Held-out examples to answer before and after: "input" for `answers`; "prompt" and "reference" to show."""
        asked = [row for row in rows if "prompt" in row][:count]
        return [
            {
                "input": row["prompt"],
                "prompt": row["prompt"][-1]["content"],
                "reference": row["completion"][-1]["content"],
            }
            for row in asked
        ]

    def answers(self, model: Any, tokenizer: Any, inputs: list[Any]) -> list[str]:
        """The model's answers to the "input" of questions."""
        return answer(model, tokenizer, inputs)

    def shown(self, row: Row, tokenizer: Any, recipe: Recipe) -> str:
        """An example as text, what is learned from in ⟦⟧."""
        found = data.render(row, tokenizer, recipe.max_length)
        return f"{found.prompt}⟦{found.answer.rstrip()}⟧"
