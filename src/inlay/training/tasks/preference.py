"""Preferences: of two answers to a prompt, which one; direct preference optimisation (Rafailov et al., 2305.18290)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from datasets import Dataset
from rich.console import Console
from torch import Tensor
from trl import DPOConfig
from trl.data_utils import extract_prompt

from inlay.data.formats import (
    BEFORE,
    SYSTEM,
    Row,
    Rules,
    chat_cell,
    chat_turns,
    convert_all,
    earlier_turns,
    system_of,
    text_cell,
)
from inlay.data.records import Record
from inlay.data.render import as_plain_text, render
from inlay.recipe.peft_methods import FULL
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples, announce, measured
from inlay.training.mixture import rules_of, train_and_heldout
from inlay.training.tasks.instruction import Task, collate
from inlay.training.trainer import PreferenceTrainer

PREFERENCE_FORMATS = {
    "preference": {
        "prompt": ("prompt", "question", "instruction"),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        **BEFORE,
    },
    "chats": {"chosen": ("chosen",), "rejected": ("rejected",), **SYSTEM},
}


class Preference(Task):
    """Through trl's DPOTrainer. The reference is the model without its adapter; where all of it is trained, its own
    log-probabilities from before. DPO's β and variants go under `trainer`: {beta: 0.1}."""

    trainer, arguments = PreferenceTrainer, DPOConfig
    metrics = ("rewards/accuracies", "rewards/margins")

    def examples(self, recipe: Recipe, tokenizer: Any, console: Console) -> Examples:
        train, held = train_and_heldout(
            recipe,
            lambda records, rules: preference_examples(records, recipe, rules),
            console,
            lambda r: r["prompt"][-1]["content"],
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


def preference_examples(records: list[Record], recipe: Recipe, rules: Rules | None = None) -> list[Row]:
    """Records as conversations {"prompt", "chosen", "rejected"}; of two chats, the prompt is what they share."""
    rules = rules or rules_of(recipe)

    def row(record: Record, roles: dict[str, str]) -> list[Row]:
        answers = {side: answer_turns(record[roles[side]], roles[side]) for side in SIDES}
        prompt = prompt_turns(record.get(roles.get("prompt", "")), roles)
        if not prompt:
            if not all(len(turns) > 1 for turns in answers.values()):
                raise ValueError("chosen and rejected without a prompt; accepted: two chats, or a prompt column")
            both: dict[str, Any] = extract_prompt(dict(answers))
            prompt, answers = both["prompt"], {side: both[side] for side in SIDES}
        prompt = earlier_turns(record, roles) + prompt
        system = system_of(record, roles, rules.system, prompt)
        made: Row = {}
        for side, turns in answers.items():
            (one,) = chat_turns(chat_cell(prompt + without_prompt(turns, prompt), side), system)[-1:]
            made |= {"prompt": one["prompt"], side: one["completion"]}
        if made["chosen"] == made["rejected"]:
            raise ValueError("chosen and rejected are the same answer")
        return [made]

    return convert_all(records, rules, PREFERENCE_FORMATS, row)


def prompt_turns(cell: Any, roles: dict[str, str]) -> list[Row]:
    """The turns of a prompt column: its chat, or its text as the user's; none where it is empty."""
    if cell is None:
        return []
    return chat_cell(cell, roles["prompt"]) if isinstance(cell, list) else [user(text_cell(cell, roles["prompt"]))]


def user(text: str) -> Row:
    """A message by the user."""
    return {"role": "user", "content": text}


def answer_turns(cell: Any, name: str) -> list[Row]:
    """The messages of an answer: a chat's, those in Anthropic's form of dialogues, or its text as the assistant's."""
    if isinstance(cell, list):
        return [dict(turn) if isinstance(turn, dict) else turn for turn in cell]
    text = text_cell(cell, name)
    parts = re.split(r"\n\n(Human|Assistant): ?", text) if text.startswith("\n\nHuman:") else []
    if parts and parts[-2] == "Assistant":
        speakers = {"Human": "user", "Assistant": "assistant"}
        return [{"role": speakers[who], "content": said} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    return [{"role": "assistant", "content": text}]


def without_prompt(turns: list[Row], prompt: list[Row]) -> list[Row]:
    """The turns of an answer without those of the prompt, with which a whole chat begins."""
    if len(turns) < 2:
        return turns
    whole = chat_cell(turns, "messages")
    for start in range(len(prompt)):  # a system message, or earlier turns, may stand in the prompt alone
        if whole[: len(prompt) - start] == prompt[start:]:
            return whole[len(prompt) - start :]
    return whole


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
