"""Batches of examples of similar length, in an order that a seed and the epoch give."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from datasets import Dataset
from pyarrow import compute
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


def token_counts(dataset: Dataset) -> list[int]:
    """Return the length of each example in tokens, over all its columns of ids: a preference has several."""
    columns = [name for name in dataset.column_names if name.endswith("_ids")]
    table = dataset.select_columns(columns).with_format("arrow")[:]
    counts = [compute.call_function("list_value_length", [table[name]]).to_pylist() for name in columns]
    return [sum(of_example) for of_example in zip(*counts, strict=True)]


class LengthGroups(Sampler[int]):
    """Draw examples in groups of similar length, as transformers does; the order is whole again after a stop.

    transformers' own sampler takes its order from torch's generator, whose state at the start of an epoch no
    checkpoint holds.

    Args:
        lengths: of the examples.
        size: of an optimiser step, in examples over all processes.
        seed: of the order, together with the epoch.
    """

    def __init__(self, lengths: list[int], size: int, seed: int) -> None:
        self.lengths = lengths
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration is of; transformers calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.size, generator=generator))
