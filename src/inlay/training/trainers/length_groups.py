"""Batches of examples of similar length, in an order that a seed and the epoch give."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from datasets import Dataset
from pyarrow import compute
from torch.utils.data import Sampler

POOL = 64  # steps' worth of examples among which those of similar length are found
PAYS = 0.05  # the share of tokens that groups must spare, to be chosen


def token_counts(dataset: Dataset) -> list[int]:
    """Return the length of each example in tokens, over all its columns of ids: a preference has several.

    Nothing is returned where the examples are no tokens yet.
    """
    columns = [name for name in dataset.column_names if name.endswith("_ids")]
    if not columns:
        return []
    table = dataset.select_columns(columns).with_format("arrow")[:]
    counts = [compute.call_function("list_value_length", [table[name]]).to_pylist() for name in columns]
    return [sum(of_example) for of_example in zip(*counts, strict=True)]


def tokens_spared(lengths: list[int], batch: int, size: int, seed: int) -> float:
    """Return the share of the tokens of random batches, padding included, that batches of similar length spare.

    Args:
        lengths: of the examples, in tokens.
        batch: examples that are padded together.
        size: of an optimiser step, in examples over all processes.
        seed: of the order.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = list(LengthGroups(lengths, size, seed))
    return 1 - padded_tokens(lengths, groups, batch) / padded_tokens(lengths, order, batch)


def padded_tokens(lengths: list[int], order: list[int], batch: int) -> int:
    """Return how many tokens are computed where examples come in this order, each batch as long as its longest."""
    parts = [[lengths[i] for i in order[k : k + batch]] for k in range(0, len(order), batch)]
    return sum(max(part) * len(part) for part in parts)


class LengthGroups(Sampler[int]):
    """Draw steps of examples of similar length, in random order.

    transformers' own sampler goes from long examples to short ones, fifty steps at a time, and takes its order from
    torch's generator, whose state at the start of an epoch no checkpoint holds.

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
        order = torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, len(order), POOL * self.size):
            near = sorted(order[start : start + POOL * self.size], key=self.lengths.__getitem__, reverse=True)
            steps = torch.randperm(len(near) // self.size, generator=generator).tolist()
            for k in (*steps, len(steps)):  # the last of an epoch may be short
                yield from near[k * self.size : (k + 1) * self.size]
