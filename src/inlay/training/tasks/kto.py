"""Single answers, desirable or not: Kahneman-Tversky optimisation (KTO; Ethayarajh et al., 2402.01306)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import KTOConfig

from inlay.data.audit import audit_examples
from inlay.data.formats import Row
from inlay.data.render import render
from inlay.data.unpaired import unpaired_examples
from inlay.recipe.peft_methods import FULL
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples
from inlay.training.mixture import train_and_heldout
from inlay.training.run_tokenizer import answer_ends, check_limits
from inlay.training.tasks.instruction import Loss, Settings, Task, collate, label_losses
from inlay.training.tasks.preference import encoded_from, first_question, with_room
from inlay.training.trainers.trainer import KTOTrainer


class KTO(Task):
    """Train by answers that are each desirable or not, through trl's KTOTrainer.

    The reference is that of task preference. KTO's β and weights go under `trainer`: {beta: 0.1, desirable_weight: 1}.
    """

    trainer, arguments = KTOTrainer, KTOConfig
    metrics = ("rewards/margins",)

    def examples(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
        if recipe.batch_size == 1 and recipe.trainer.get("loss_type", KTOConfig.loss_type) == "kto":
            raise ValueError(
                "batch_size: task kto estimates its reference point from other answers of a batch, and 1 has none; "
                "take 2 or more"
            )
        train, held = train_and_heldout(recipe, unpaired_examples, console, first_question)
        audit = audit_examples(train, tokenizer, recipe.max_length, answer_ends(recipe))
        counts = Counter(row["label"] for row in train)
        console.print(
            f"{counts[True]} desirable and {counts[False]} undesirable answers to train on, {len(held)} held out; "
            f"longest {audit.longest} tokens"
        )
        for note in audit.notes + unbalanced(counts, recipe):
            console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
        train, held = (with_room(self, part, tokenizer, recipe, console) for part in (train, held))
        if audit.cut:
            console.print(f"{audit.cut} answers are cut at max_length={recipe.max_length}", style="yellow")
        check_limits(recipe, tokenizer, audit.largest_token, min(audit.longest, recipe.max_length))
        return Examples(train, held, audit, conversations=len(held))

    def unfit(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str | None:
        """Return why an example cannot be learned from, if so."""
        full = len(encode_answer(row, tokenizer)["prompt_ids"]) >= recipe.max_length
        return "their prompt alone fills" if full else None

    def settings(self, recipe: Recipe) -> Settings:
        return {
            "max_length": recipe.max_length,
            "precompute_ref_log_probs": recipe.method == FULL,
            "train_sampling_strategy": "sequential",  # of examples that the trainer has shuffled
        }

    def dataset(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
        return Dataset.from_list([encode_answer(row, tokenizer) for row in rows])

    def batch(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, Tensor] | None:
        """Return the answers, and under "desirable" which of them are."""
        shown = [(render(row, tokenizer, recipe.max_length), row["label"]) for row in rows]
        shown = [(one, label) for one, label in shown if one.answer_ids]
        made = collate([(one.ids, one.labels) for one, _ in shown], tokenizer)
        return made and {**made, "desirable": torch.tensor([label for _, label in shown])}

    def loss(self, recipe: Recipe) -> Loss:
        values = {name: recipe.trainer.get(name, vars(KTOConfig)[name]) for name in WEIGHTS}
        return lambda model, batch: first_loss(model, batch, *values.values())

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return super().questions([row for row in rows if row["label"]], count)

    def shown(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
        kind = "desirable" if row["label"] else "undesirable"
        return f"{super().shown(row, tokenizer, recipe)} ({kind})"


WEIGHTS = ("beta", "desirable_weight", "undesirable_weight")  # of KTO's loss


def unbalanced(counts: Counter[bool], recipe: Recipe) -> list[str]:
    """Return a line where the weights of both kinds of answers are outside of what KTO's authors advise (eq. 8)."""
    desirable, undesirable = (recipe.trainer.get(name, 1.0) for name in WEIGHTS[1:])
    if not all(counts[kind] for kind in (True, False)):
        return [f"all answers to train on are {'desirable' if counts[True] else 'undesirable'}; KTO is for both kinds"]
    ratio = desirable * counts[True] / (undesirable * counts[False])
    if 0.99 <= ratio <= 4 / 3 + 0.01:
        return []
    advised = undesirable * counts[False] / counts[True]
    return [
        f"desirable answers weigh {ratio:.2g} times the undesirable ones in total; KTO's authors advise 1 to 4/3: "
        f"trainer: {{desirable_weight: {advised:.3g}}}"
    ]


def encode_answer(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return an example as trl's trainer takes it."""
    prompt, (answer,) = encoded_from([row], tokenizer)
    return {"prompt_ids": prompt, "completion_ids": answer, "label": row["label"]}


def first_loss(model: Any, batch: dict[str, Any], beta: float, desirable: float, undesirable: float) -> Tensor:
    """Return KTO's loss where the policy is its own reference: ½ λ each, with slope ∓λ β/4 in the log-probability."""
    kinds = batch["desirable"]
    labelled, losses = label_losses(model, {key: value for key, value in batch.items() if key != "desirable"})
    scores = -losses.new_zeros(labelled.shape).masked_scatter(labelled, losses).sum(1)
    signs = torch.where(kinds, 1.0, -1.0).to(scores)
    weights = torch.where(kinds, desirable, undesirable).to(scores)
    return (weights * (1 - torch.sigmoid(beta * signs * (scores - scores.detach())))).mean()
