"""Reward models: a score of each answer, learned from pairs (Bradley and Terry 1952; Ouyang et al., 2203.02155)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig

from inlay.data.chats import answer_text
from inlay.data.formats import Row
from inlay.data.preferences import SIDES
from inlay.evaluation.rewards import encode_pairs, pair_rewards
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples
from inlay.training.run_tokenizer import padding_tokenizer
from inlay.training.tasks.instruction import Loss, Settings
from inlay.training.tasks.preference import Preference
from inlay.training.trainers.trainer import RewardTrainer


class Reward(Preference):
    """Train a new head of one output to score chosen answers above rejected ones, through trl's RewardTrainer.

    The score is read at a conversation's last token, so none is cut: longer ones are left out.
    """

    trainer, arguments = RewardTrainer, RewardConfig
    metrics = ("accuracy", "margin")
    cuts = False

    def processor(self, recipe: Recipe) -> Any:
        """Return a tokenizer that pads."""
        return padding_tokenizer(recipe)

    def examples(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
        made = super().examples(recipe, tokenizer, console)
        made.padding = cast("int", tokenizer.pad_token_id)
        return made

    def unfit(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str | None:
        longest = max(map(len, encode_pairs([row], tokenizer)))
        return "a side of them is longer than" if longest > recipe.max_length else None

    def model_settings(self, rows: Examples) -> Settings:
        return {
            "num_labels": 1,
            "id2label": {0: "reward"},
            "label2id": {"reward": 0},
            "problem_type": "regression",
            "pad_token_id": rows.padding,  # by which a decoder finds the last token of each text
        }

    def settings(self, recipe: Recipe) -> Settings:
        return {"max_length": recipe.max_length}

    def dataset(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
        ids = encode_pairs(rows, tokenizer)
        columns = zip(SIDES, (ids[: len(rows)], ids[len(rows) :]), strict=True)
        return Dataset.from_dict({f"{side}_ids": own for side, own in columns})

    def batch(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, Tensor] | None:
        """Return the chosen chats, then the rejected ones."""
        padded = tokenizer.pad({"input_ids": encode_pairs(rows, tokenizer)}, padding_side="right", return_tensors="pt")
        return dict(padded)

    def loss(self, recipe: Recipe) -> Loss:
        return pairwise_loss

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return [
            {
                "input": row,
                "prompt": row["prompt"][-1]["content"],
                "reference": " > ".join(answer_text(row[side][-1]) for side in SIDES),
            }
            for row in rows[:count]
        ]

    def answers(self, model: Any, tokenizer: PreTrainedTokenizerBase, inputs: list[Any]) -> list[str]:
        """Return the rewards of both answers of each pair."""
        return [" and ".join(f"{one:.2f}" for one in pair) for pair in pair_rewards(model, tokenizer, inputs)]


def pairwise_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return −log σ of how much more the chosen answers score, on average."""
    chosen, rejected = torch.chunk(model(**batch).logits.float().squeeze(-1), 2)
    return -F.logsigmoid(chosen - rejected).mean()
