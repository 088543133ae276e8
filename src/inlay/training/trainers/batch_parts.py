"""Batches taken in parts of rows of similar length, so that little of their padding is computed.

A loss that is a sum over tokens, divided by a number that is known before, may be summed over any parts of its batch.
A part costs one pass more through the model, which on a CPU in fp32 takes the time of some tens of tokens. In bf16,
whose products are fast only with many tokens, it takes more than is spared.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
import transformers
from torch import Tensor, nn

from inlay.data.render import IGNORED
from inlay.host.distributed import process_count
from inlay.training.trainers.token_weights import WEIGHTS, Batch

Base = transformers.Trainer if TYPE_CHECKING else object

PASS = 48  # tokens that take as long as what a pass costs beside its tokens: `benchmarks/step_profile.py`
TEXT = {"input_ids", "attention_mask", "labels"}  # what a batch of text holds, each rows × tokens
PER_BATCH = ("entropy", "mean_token_accuracy")  # what trl notes of each batch, as means over its labelled tokens


class InParts(Base):
    """Extend trl's SFTTrainer: on a CPU in fp32 it takes a padded batch in parts, with the same loss and gradients."""

    def _divides(self) -> bool:
        """Return whether a step may be taken in parts: by one process, where only the sum of the gradients counts."""
        return (
            self.args.device.type == "cpu"
            and process_count() == 1
            and not self.args.bf16
            and all(p.dtype == torch.float32 for p in cast(nn.Module, self.model).parameters())
            and not self.args.torch_compile  # it would compile anew for every shape
            and not self.aux_loss_enabled  # type: ignore[attr-defined]  # a mean over each batch
            and self.args.neftune_noise_alpha is None  # its noise depends on the padded length
            and "lomo" not in self.args.optim  # moves weights during the backward pass
        )

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:  # type: ignore[override]
        """Take a micro-batch as trl does, in the parts that cost least."""
        step = super().training_step
        divides = num_items_in_batch is not None and TEXT <= inputs.keys() <= {*TEXT, WEIGHTS} and self._divides()
        parts = parts_of(inputs) if divides else [inputs]
        loss = torch.stack([step(model, part, num_items_in_batch) for part in parts]).sum()
        if len(parts) > 1:
            self._join_metrics([int((part["labels"][:, 1:] != IGNORED).sum()) for part in parts])
        return loss

    def _join_metrics(self, counts: list[int]) -> None:
        """Put the mean over all labelled tokens of a batch in the place of the means of its parts."""
        noted: dict[str, list[float]] = self._metrics["train"]  # type: ignore[attr-defined]
        for values in (noted[name] for name in PER_BATCH):
            own = zip(values[-len(counts) :], counts, strict=True)
            values[-len(counts) :] = [sum(value * count for value, count in own) / max(1, sum(counts))]


def parts_of(batch: Batch) -> list[Batch]:
    """Return a batch (rows × tokens each) in parts, each as long as its longest row; one part is the batch itself."""
    mask = batch["attention_mask"]
    ends = (mask.shape[1] - mask.flip(1).argmax(1)).tolist()  # padding on the left keeps its place
    rows = cut_by_length(ends)
    if len(rows) == 1:
        return [batch]
    return [{name: value[part, : max(ends[i] for i in part)] for name, value in batch.items()} for part in rows]


def cut_by_length(lengths: list[int]) -> list[list[int]]:
    """Divide rows into parts of similar length, such that tokens, padding included, and passes cost least.

    Args:
        lengths: of the rows, in tokens.

    Returns:
        The rows of each part, the shortest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cheapest = [(0, 0)]  # the cost of the first rows in this order, and where their last part begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        cheapest.append(min((cheapest[i][0] + (end - i) * longest + PASS, i) for i in range(end)))
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(cheapest[cuts[-1]][1])
    return [sorted(order[a:b]) for a, b in pairwise(reversed(cuts))]
