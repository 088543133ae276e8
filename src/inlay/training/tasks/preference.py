"""Preferences: of two answers to a prompt, which one; direct preference optimisation (Rafailov et al., 2305.18290)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from datasets import Dataset
from rich.console import Console
from torch import Tensor
from trl import DPOConfig, extract_prompt

from inlay.data.formats import Row, chat_cell, chat_turns, convert_all, text_cell
from inlay.data.readers import Record
from inlay.data.render import as_plain_text, render
from inlay.recipe.peft_methods import FULL
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples, announce, measured, train_and_heldout
from inlay.training.tasks.instruction import Task, collate
from inlay.training.trainer import PreferenceTrainer

PREFERENCE_FORMATS = {
    "preference": {
        "prompt": ("prompt", "question", "instruction"),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
    },
    "chats": {"chosen": ("chosen",), "rejected": ("rejected",)},
}


class Preference(Task):
    """Through trl's DPOTrainer. The reference is the model without its adapter; where all of it is trained, its own
    log-probabilities from before. DPO's β and variants go under `trainer`: {beta: 0.1}."""

    trainer, arguments = PreferenceTrainer, DPOConfig
    metrics = ("rewards/accuracies", "rewards/margins")

    def examples(self, recipe: Recipe, tokenizer: Any, console: Console) -> Examples:
        train, held = train_and_heldout(
            recipe, lambda records: preference_examples(records, recipe), lambda r: r["prompt"][-1]["content"]
        )
        lengths = [
            max(render({"prompt": r["prompt"], "completion": r[side]}, tokenizer, None).length for side in SIDES)
            for r in train
        ]
        made = Examples(train, held, measured(lengths, recipe))
        announce(made, recipe, console)
        return made

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"max_length": recipe.max_length, "precompute_ref_log_probs": recipe.method == FULL}

    def dataset(self, rows: list[Row], tokenizer: Any, recipe: Recipe) -> Dataset:
        return Dataset.from_list(rows if tokenizer.chat_template else [preference_as_text(row) for row in rows])

    def batch(self, rows: list[Row], tokenizer: Any, recipe: Recipe) -> dict[str, Tensor] | None:
        """The chosen answers, then the rejected ones."""
        shown = [
            [render({"prompt": row["prompt"], "completion": row[side]}, tokenizer, recipe.max_length) for side in SIDES]
            for row in rows
        ]
        whole = [pair for pair in shown if all(one.answer_ids for one in pair)]
        return collate([(pair[i].prompt_ids, pair[i].answer_ids) for i in (0, 1) for pair in whole], tokenizer)

    def loss(self, recipe: Recipe) -> Callable[[Any, Any], Tensor]:
        beta = recipe.trainer.get("beta", DPOConfig.beta)
        return lambda model, batch: first_loss(model, batch, beta)

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return [
            {"input": r["prompt"], "prompt": r["prompt"][-1]["content"], "reference": r["chosen"][-1]["content"]}
            for r in rows[:count]
        ]

    def shown(self, row: Row, tokenizer: Any, recipe: Recipe) -> str:
        sides = [{"prompt": row["prompt"], "completion": row[side]} for side in SIDES]
        return "\n".join(Task.shown(self, side, tokenizer, recipe) for side in sides)


SIDES = ("chosen", "rejected")


def preference_examples(records: list[Record], recipe: Recipe) -> list[Row]:
    """Records as conversations {"prompt", "chosen", "rejected"}; of two chats, the prompt is what they share."""

    def row(record: Record, roles: dict[str, str]) -> list[Row]:
        cells = {role: record[column] for role, column in roles.items()}
        if "prompt" not in cells:
            if not all(isinstance(cells[side], list) for side in SIDES):
                raise ValueError("chosen and rejected without a prompt; accepted: two chats, or a prompt column")
            cells = extract_prompt({side: chat_cell(cells[side], side) for side in SIDES})
        ask = cells["prompt"]
        prompt = ask if isinstance(ask, list) else [{"role": "user", "content": text_cell(ask, roles["prompt"])}]
        made: Row = {}
        for side in SIDES:
            said = cells[side]
            turns = said if isinstance(said, list) else [{"role": "assistant", "content": text_cell(said, side)}]
            (one,) = chat_turns(chat_cell(prompt + turns, side), recipe.system)[-1:]
            made |= {"prompt": one["prompt"], side: one["completion"]}
        if made["chosen"] == made["rejected"]:
            raise ValueError("chosen and rejected are the same answer")
        return [made]

    return convert_all(records, recipe.columns, PREFERENCE_FORMATS, row)


def preference_as_text(row: Row) -> Row:
    """As strings, for a tokenizer without a chat template."""
    made = {side: as_plain_text({"prompt": row["prompt"], "completion": row[side]}) for side in SIDES}
    return {"prompt": made["chosen"]["prompt"], **{side: made[side]["completion"] for side in SIDES}}


def first_loss(model: Any, batch: dict[str, Tensor], beta: float) -> Tensor:
    """DPO's loss where the policy is its own reference: log 2, with the slope −β/2 in each pair's margin."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    scores = (
        -F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape).sum(1)
    )
    chosen, rejected = scores.chunk(2)
    margin = chosen - rejected
    return -F.logsigmoid(beta * (margin - margin.detach())).mean()
