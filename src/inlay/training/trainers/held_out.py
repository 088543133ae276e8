"""Held-out loss as the mean over all answer tokens, whatever the batches.

transformers averages the means of batches, so that a token of a short answer counts for more than one of a long answer,
and the result depends on the batch size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

Base = transformers.Trainer if TYPE_CHECKING else object


class HeldOutTokens(Base):
    """Evaluate as the sum of the tokens' scores over all rows, divided by the number of tokens.

    No label smoothing, auxiliary loss or other form of the training loss is in them.
    """

    token_metrics: tuple[str, ...] = ("loss",)  # what `token_scores` gives, in its order
    row_sums: list[list[float]]  # of the last evaluation, each row's count of tokens and its sums of their scores

    def token_scores(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """Return which tokens of a batch count (rows × tokens), and their scores, zero for the others."""
        raise NotImplementedError

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, None]:
        """Return the sums of each row as the predictions, which transformers gathers from all processes."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            counted, scores = self.token_scores(model, inputs)
        return None, torch.stack([score.float().sum(1) for score in (counted, *scores)], 1), None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as transformers does, with the means over all tokens as metrics."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.row_sums = np.asarray(output.predictions, dtype=np.float64).round(4).tolist()
        count, *sums = np.asarray(output.predictions, dtype=np.float64).sum(0).tolist()
        means = {name: total / count for name, total in zip(self.token_metrics, sums, strict=True)}
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})
