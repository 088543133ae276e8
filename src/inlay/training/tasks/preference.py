"""Preferences: of two answers to a prompt, which one; direct preference optimisation (Rafailov et al., 2305.18290)."""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from inlay.data.audit import Audit, audit_examples
from inlay.data.chats import Example, answer_text
from inlay.data.formats import Row
from inlay.data.preferences import SIDES, preference_examples
from inlay.data.render import IGNORED, common, encode_example
from inlay.recipe.peft_methods import FULL
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples
from inlay.training.mixture import train_and_heldout
from inlay.training.run_tokenizer import answer_ends, check_limits
from inlay.training.tasks.instruction import Loss, Settings, Task, collate, label_losses
from inlay.training.trainers.trainer import PreferenceTrainer


class Preference(Task):
    """Train by preferences, through trl's DPOTrainer.

    The reference is the model without its adapter or, where all of it is trained, its own log-probabilities from
    before. DPO's β and variants go under `trainer`: {beta: 0.1}.
    """

    trainer, arguments = PreferenceTrainer, DPOConfig
    metrics = ("rewards/accuracies", "rewards/margins")
    cuts = True  # answers at max_length

    def examples(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
        train, held = train_and_heldout(
            recipe, lambda records, rules: preference_examples(records, rules=rules), console, first_question
        )
        sides = [side_of(row, side) for row in train for side in SIDES]
        audit = audit_examples(sides, tokenizer, recipe.max_length, answer_ends(recipe))
        console.print(f"{len(train)} pairs to train on, {len(held)} held out; longest {audit.longest} tokens")
        for note in audit.notes:
            console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
        rows, heldout = (with_room(self, part, tokenizer, recipe, console) for part in (train, held))
        if audit.cut and self.cuts:
            console.print(f"{audit.cut} answers are cut at max_length={recipe.max_length}", style="yellow")
        check_limits(recipe, tokenizer, audit.largest_token, min(audit.longest, recipe.max_length))
        found = Audit(len(rows), audit.cut, audit.masked, 0, audit.longest, audit.mean_tokens, audit.answer_tokens)
        return Examples(rows, heldout, found, conversations=len(held))

    def unfit(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str | None:
        """Return why a pair cannot be learned from, if so."""
        full = len(encode_pair(row, tokenizer)["prompt_ids"]) >= recipe.max_length
        return "their prompt alone fills" if full else None

    def settings(self, recipe: Recipe) -> Settings:
        return {"max_length": recipe.max_length, "precompute_ref_log_probs": recipe.method == FULL}

    def dataset(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
        return Dataset.from_list([encode_pair(row, tokenizer) for row in rows])

    def batch(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, Tensor] | None:
        """Return the chosen answers, then the rejected ones."""
        pairs = [encode_pair(row, tokenizer) for row in rows]
        pairs = [pair for pair in pairs if len(pair["prompt_ids"]) < recipe.max_length]
        found = []
        for side in SIDES:
            for pair in pairs:
                prompt, answer = pair["prompt_ids"], pair[f"{side}_ids"]
                ids, labels = [*prompt, *answer], [*[IGNORED] * len(prompt), *answer]
                found.append((ids[: recipe.max_length], labels[: recipe.max_length]))
        return collate(found, tokenizer)

    def loss(self, recipe: Recipe) -> Loss:
        beta = recipe.trainer.get("beta", DPOConfig.beta)
        return lambda model, batch: first_loss(model, batch, beta)

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return [
            {"input": r, "prompt": r["prompt"][-1]["content"], "reference": answer_text(r["chosen"][-1])}
            for r in rows[:count]
        ]

    def shown(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
        return "\n".join(Task.shown(self, side_of(row, side), tokenizer, recipe) for side in SIDES)


def first_question(row: Row) -> str:
    """Return what pairs of one prompt share, so that none is on both sides of a split."""
    return next(message["content"] for message in row["prompt"] if message["role"] == "user")


def side_of(row: Row, side: str) -> Example:
    """Return one side of a pair as an example."""
    about = {key: value for key, value in row.items() if key not in ("prompt", *SIDES)}
    return {"prompt": row["prompt"], "completion": row[side], **about}


def encode_pair(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Return a pair as trl's trainer takes it; both answers start where tokens differ from the prompt's alone."""
    prompt, (chosen, rejected) = encoded_from([side_of(row, side) for side in SIDES], tokenizer)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def encoded_from(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a prompt that examples share, and those of each one's answer."""
    found = [encode_example(example, tokenizer) for example in examples]
    shared = common(found[0].ids, found[-1].ids) if len(found) > 1 else len(found[0].ids)
    start = min(shared, *(one.spans[0][0] for one in found))
    return found[0].ids[:start], [one.ids[start:] for one in found]


class Fitting(Protocol):
    """Know which examples cannot be learned from."""

    def unfit(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str | None:
        """Return why an example cannot be learned from, if so."""


def with_room(
    task: Fitting, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, console: Console
) -> list[Row]:
    """Return the examples that fit into `max_length` as their task needs it; how many do not is said.

    Raises:
        ValueError: none does.
    """
    why = {i: reason for i, row in enumerate(rows) if (reason := task.unfit(row, tokenizer, recipe))}
    if len(why) == len(rows):
        raise ValueError(f"no example fits: {why[0]} max_length={recipe.max_length}; raise it")
    if why:
        console.print(
            f"{len(why)} of {len(rows)} examples are left out: {next(iter(why.values()))} "
            f"max_length={recipe.max_length}; raise --max-length to keep them",
            style="yellow",
        )
    return [row for i, row in enumerate(rows) if i not in why]


def first_loss(model: Any, batch: dict[str, Tensor], beta: float) -> Tensor:
    """Return DPO's loss where the policy is its own reference: log 2, with slope −β/2 in each pair's margin."""
    labelled, losses = label_losses(model, batch)
    scores = -losses.new_zeros(labelled.shape).masked_scatter(labelled, losses).sum(1)
    chosen, rejected = scores.chunk(2)
    margin = chosen - rejected
    return -F.logsigmoid(beta * (margin - margin.detach())).mean()
