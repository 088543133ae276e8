"""Give each module of a model a rank, from its spectrum, the cost of a rank with the method, and the allocator."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inlay.host.config import InlayConfig
from inlay.host.module_names import any_of, split_name
from inlay.inspection import noise_edge
from inlay.inspection.singular_values import Shape, target_weights, weight_spectra
from inlay.models.base import BaseModel
from inlay.numerics import rank_allocation
from inlay.numerics.rank_allocation import Direction, allocate, module_type


@dataclass(frozen=True)
class Weight:
    """Hold one weight's shape (out, in), singular values and rank, and its trained parameters.

    `numbers` counts the parameters at that rank, `uniform` those at the same r everywhere.
    """

    shape: Shape
    S: Tensor
    rank: int
    numbers: int
    uniform: int

    @property
    def signal(self) -> int:
        """Count the singular values above the noise edge (`noise_edge.edge`)."""
        return noise_edge.signal(self.S, self.shape)

    def energy(self, r: int) -> float:
        """Return the share of Σσ² in the first r triplets."""
        return rank_allocation.energy(self.S, r)

    def minor(self, r: int) -> float:
        """Return the share of Σσ² in the last r triplets; σ below 1e-8 of the largest is rounding."""
        return 1 - rank_allocation.energy(self.S, len(self.S) - r) if r < len(self.S) else 1.0


@dataclass(frozen=True)
class Inspection:
    """Hold the spectra of a model's adapted weights and the ranks that follow; of experts, each has its own."""

    model: str
    method: str
    r: int
    direction: Direction
    weights: dict[str, Weight]

    @property
    def ranks(self) -> dict[str, int]:
        """Return the rank of each module."""
        return {name: weight.rank for name, weight in self.weights.items()}

    @property
    def kinds(self) -> dict[str, dict[str, Weight]]:
        """Return the weights by type, the last component of their modules' names."""
        groups: dict[str, dict[str, Weight]] = {}
        for name, weight in self.weights.items():
            groups.setdefault(module_type(name), {})[name] = weight
        return groups

    def summary(self) -> str:
        """Summarise in one line the range of ranks, and the trained parameters against the budget."""
        ranks, weights = self.ranks.values(), self.weights.values()
        numbers, uniform = sum(w.numbers for w in weights), sum(w.uniform for w in weights)
        return (
            f"ranks by energy ({self.direction}): {min(ranks)} to {max(ranks)}, "
            f"{numbers:,} parameters; r = {self.r} everywhere: {uniform:,}"
        )


def inspection(base: BaseModel, config: InlayConfig, direction: Direction, **model: Any) -> Inspection:
    """Compute spectra and ranks of the weights that a config adapts.

    Args:
        base: the model.
        config: of the adapter.
        direction: which spectra get more.
        model: further arguments of `BaseModel.meta`: its class, its settings.

    Raises:
        ValueError: the model or the config cannot be used, or the method has no rank.
    """
    r = allocated_ranks(config)
    shapes = target_weights(base, config, **model)
    values = weight_spectra(base, shapes, **model)
    cost = rank_cost(config, shapes)
    ranks = allocate(values, r, cost, direction)
    weights = {
        name: Weight(shapes[name], values[name], ranks[name], cost(name, ranks[name]), cost(name, r)) for name in shapes
    }
    return Inspection(base.name, str(config.method), r, direction, weights)


def allocated_ranks(config: InlayConfig) -> int:
    """Return a config's rank r, whose parameters are the budget to allocate.

    Raises:
        ValueError: its method has no rank of its own in each layer.
    """
    method = config.build()
    if method.shared:
        shared = ", ".join(sorted(method.shared))
        raise ValueError(f"{method.name} shares {shared} between layers, so no layer has a rank of its own to allocate")
    r = vars(method).get("r")
    if r is None:
        raise ValueError(f"{method.name} has no rank r to allocate; choose a method with one, such as lamda or lora")
    return r


def rank_cost(config: InlayConfig, shapes: Mapping[str, Shape]) -> Callable[[str, int], int]:
    """Return a function that counts the parameters that a config's method trains on a module at a rank."""
    method: Any = config.build()  # one with the field r

    @functools.cache
    def count(shape: Shape, rank: int) -> int:
        start = replace(method, r=rank).start(torch.empty(shape, device="meta"))
        return sum(p.numel() for symbol, p in start.items() if symbol not in method.frozen)

    return lambda name, rank: count(shapes[name], rank)


def patterns(ranks: Mapping[str, int], key: str = "r") -> dict[str, dict[str, int]]:
    """Return ranks (or another hyperparameter `key`) as a recipe's `patterns`.

    These are regexes for whole names; one regex covers all layers with the same rank, and the experts of a layer.
    """
    experts: dict[tuple[str, str, str, int], list[str]] = {}  # of one layer and rank; [""] where there are none
    for name, rank in ranks.items():
        head, index, tail = split_name(name)
        part, _, e = tail.rpartition(".")
        part, e = (f"{part}.", e) if part and e.isdigit() else (tail, "")
        experts.setdefault((head, index, part, rank), []).append(e)
    groups: dict[tuple[str, str, str, int], list[str]] = {}
    for (head, index, part, rank), numbers in experts.items():
        groups.setdefault((head, part, any_of(numbers), rank), []).append(index)
    # ^, because without it a pattern may match the end of a longer name
    return {
        f"^{re.escape(head)}{any_of(indices)}{re.escape(part)}{numbers}": {key: rank}
        for (head, part, numbers, rank), indices in groups.items()
    }
