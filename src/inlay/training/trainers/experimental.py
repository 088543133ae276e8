"""trl's trainers without a reference model, which trl calls experimental: imported by the tasks that need them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from inlay.data.preferences import SIDES
from inlay.training.trainers.trainer import HeldOutMeans, Inputs, Means, Safe

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
    from trl.experimental import cpo, orpo


class TokenPairs(HeldOutMeans):
    """Take pairs that are tokens already, and count them."""

    concatenated_inputs: Callable[..., Inputs]  # trl's: the sides of a batch as one

    def tokenize_row(self, feature: Inputs, model: nn.Module | None = None) -> Inputs:
        """Return a row as it is."""
        return feature

    def kinds(self, inputs: Inputs) -> list[int]:
        """Return how many pairs a batch holds."""
        return [len(inputs["chosen_labels"])]

    def held_out_metrics(self) -> Means:
        """Return the values of each metric, one for each batch of an evaluation."""
        return cast(Any, self)._stored_metrics["eval"]

    def model_inputs(self, inputs: Inputs) -> Inputs:
        """Return both sides as the model takes them."""
        pad = self.processing_class.pad_token_id  # type: ignore[union-attr]
        both = self.concatenated_inputs(self._prepare_inputs(inputs), padding_value=pad, device=self.args.device)
        return {name: both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask")}

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Take a step, and count its tokens, which these trainers do not."""
        tokens = torch.stack([inputs[f"{side}_attention_mask"].sum() for side in SIDES]).sum().to(self.args.device)
        self.state.num_input_tokens_seen += int(cast(Tensor, self.accelerator.reduce(tokens)))
        return super().training_step(model, inputs, num_items_in_batch)


class ORPOTrainer(TokenPairs, Safe, orpo.ORPOTrainer):
    """Extend trl's ORPOTrainer."""


class SimPOTrainer(TokenPairs, Safe, cpo.CPOTrainer):
    """Extend trl's CPOTrainer, whose loss SimPO is one of."""


ORPOConfig, CPOConfig = orpo.ORPOConfig, cpo.CPOConfig
