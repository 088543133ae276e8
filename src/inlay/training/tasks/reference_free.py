"""Preferences without a reference model: ORPO (Hong et al., 2403.07691) and SimPO (Meng et al., 2405.14734)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from inlay.data.formats import Row
from inlay.data.preferences import SIDES
from inlay.data.render import IGNORED
from inlay.recipe.recipe import Recipe
from inlay.training.tasks.instruction import Loss, Settings, label_losses
from inlay.training.tasks.preference import Preference, encode_pair


class ReferenceFree(Preference):
    """Train by preferences, with the mean log-probability of an answer's tokens as its score."""

    def settings(self, recipe: Recipe) -> Settings:
        return {"max_length": recipe.max_length, "remove_unused_columns": False}

    def dataset(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
        columns: dict[str, list] = {}
        for pair in (encode_pair(row, tokenizer) for row in rows):
            for side in SIDES:
                prompt, answer = pair["prompt_ids"], pair[f"{side}_ids"]
                ids, labels = [*prompt, *answer], [*[IGNORED] * len(prompt), *answer]
                own = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
                for name, values in own.items():
                    columns.setdefault(f"{side}_{name}", []).append(values[: recipe.max_length])
        return Dataset.from_dict(columns)


class ORPO(ReferenceFree):
    """Train by likelihood of chosen texts and by the odds of both answers; λ is `trainer: {beta: 0.1}`."""

    @property
    def trainer(self) -> type:  # type: ignore[override]
        """Return trl's ORPOTrainer."""
        from inlay.training.trainers.experimental import ORPOTrainer

        return ORPOTrainer

    @property
    def arguments(self) -> type:  # type: ignore[override]
        """Return trl's ORPOConfig."""
        from inlay.training.trainers.experimental import ORPOConfig

        return ORPOConfig

    def loss(self, recipe: Recipe) -> Loss:
        beta = recipe.trainer.get("beta", self.arguments.beta)
        return lambda model, batch: odds_loss(model, batch, beta)


class SimPO(ReferenceFree):
    """Train by the margin of both answers' scores; β and γ are `trainer: {beta: 2.0, simpo_gamma: 1.0}`."""

    @property
    def trainer(self) -> type:  # type: ignore[override]
        """Return trl's CPOTrainer."""
        from inlay.training.trainers.experimental import SimPOTrainer

        return SimPOTrainer

    @property
    def arguments(self) -> type:  # type: ignore[override]
        """Return trl's CPOConfig."""
        from inlay.training.trainers.experimental import CPOConfig

        return CPOConfig

    def settings(self, recipe: Recipe) -> Settings:
        own = {name: value for name, value in SIMPO.items() if name not in recipe.trainer}  # trl's β is CPO's
        return {**super().settings(recipe), "loss_type": "simpo", "cpo_alpha": 0.0, **own}

    def loss(self, recipe: Recipe) -> Loss:
        beta, gamma = (recipe.trainer.get(name, value) for name, value in SIMPO.items())
        return lambda model, batch: margin_loss(model, batch, beta, gamma)


SIMPO = {"beta": 2.0, "simpo_gamma": 1.0}  # as the paper tunes them: β from 2, γ half of it


def mean_scores(labelled: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean log-probabilities of the chosen and of the rejected answers."""
    chosen, rejected = (-(losses * labelled).sum(1) / labelled.sum(1)).chunk(2)
    return chosen, rejected


def spread_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return which tokens are labelled, and their losses in their places; zero for the others."""
    labelled, losses = label_losses(model, batch)
    return labelled, losses.new_zeros(labelled.shape).masked_scatter(labelled, losses)


def margin_loss(model: Any, batch: dict[str, Tensor], beta: float, gamma: float) -> Tensor:
    """Return SimPO's loss (eq. 6)."""
    chosen, rejected = mean_scores(*spread_losses(model, batch))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).mean()


def odds_loss(model: Any, batch: dict[str, Tensor], beta: float) -> Tensor:
    """Return ORPO's loss (eq. 6) as trl has it, with the likelihood of the chosen texts and their prompts."""
    every = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    kept, losses = spread_losses(model, {**batch, "labels": every})
    chosen, rejected = mean_scores(batch["labels"][:, 1:] != IGNORED, losses)
    odds = chosen - rejected - ((-chosen.exp()).log1p() - (-rejected.exp()).log1p())
    count = len(losses) // 2
    return losses[:count].sum() / kept[:count].sum() - beta * F.logsigmoid(odds).mean()
