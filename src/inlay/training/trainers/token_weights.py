"""Weights of answers: a token of an answer with weight w counts w times in the mean that is the loss.

Over the micro-batches of a step the mean is Σ wᵢ lossᵢ / Σ wᵢ, as if each answer stood there so often.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from inlay.data.formats import Row
from inlay.data.render import IGNORED

Batch = dict[str, Tensor]
WEIGHTS = "token_weights"  # a column of rows that are weighted, and what their batches call it


class WithWeights:
    """Collate rows as trl does, and their weights as it does their labels.

    Args:
        collate: trl's collator.
    """

    def __init__(self, collate: Callable[[list[Row]], Batch]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Row]) -> Batch:
        """Return a batch of rows."""
        batch = self.collate(rows)
        if WEIGHTS in rows[0]:
            length = batch["labels"].shape[1]
            kept = [torch.tensor(row[WEIGHTS][: len(row["labels"])]) for row in rows]  # trl cuts its own columns alone
            weights = torch.stack([pad(one, (0, length - len(one))) for one in kept])
            batch[WEIGHTS] = weights.where(batch["labels"] != IGNORED, 0.0)
        return batch


def scale_to_mean_one(batches: list[Batch], total: Callable[[Tensor], Tensor]) -> None:
    """Scale the weights in the micro-batches of a step, so that learned tokens have 1 on average.

    Args:
        batches: of the step.
        total: sums a tensor over all processes.
    """
    pairs = [
        torch.stack([(batch["labels"][:, 1:] != IGNORED).sum(), batch[WEIGHTS][:, 1:].double().sum()])
        for batch in batches
    ]
    count, weight = total(torch.stack(pairs).sum(0))
    for batch in batches:
        batch[WEIGHTS] = batch[WEIGHTS] * (count / weight).to(batch[WEIGHTS])
