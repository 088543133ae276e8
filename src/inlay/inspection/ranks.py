"""From a model and a config to a rank per module: spectra, what a rank costs with this method, and the allocator."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from inlay.allocate import Direction, allocate, by_threshold, energy, kind_of
from inlay.host.config import InlayConfig
from inlay.workbench import edge, spectra
from inlay.workbench.recipe import Recipe
from inlay.workbench.spectra import Shape


@dataclass(frozen=True)
class Weight:
    """One module: its (out, in), singular values and rank, and the numbers it trains at that rank and at the same r
    everywhere."""

    shape: Shape
    S: Tensor
    rank: int
    numbers: int
    uniform: int

    @property
    def signal(self) -> int:
        """How many singular values lie above the noise edge (`edge`)."""
        return edge.signal(self.S, self.shape)

    def energy(self, r: int) -> float:
        """The share of Σσ² in the first r triplets."""
        return energy(self.S, r)

    def minor(self, r: int) -> float:
        """The share of Σσ² in the last r triplets; what a σ of 1e-8 of the largest or less has is rounding."""
        return 1 - energy(self.S, len(self.S) - r) if r < len(self.S) else 1.0


@dataclass(frozen=True)
class Inspection:
    """The spectra of a model's adapted modules and the ranks they lead to."""

    model: str
    method: str
    r: int
    direction: Direction
    weights: dict[str, Weight]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module."""
        return {name: weight.rank for name, weight in self.weights.items()}

    @property
    def kinds(self) -> dict[str, dict[str, Weight]]:
        """The modules by type, the last component of their names."""
        groups: dict[str, dict[str, Weight]] = {}
        for name, weight in self.weights.items():
            groups.setdefault(kind_of(name), {})[name] = weight
        return groups

    def summary(self) -> str:
        """One line: the range of ranks, and the numbers trained against the budget."""
        ranks, weights = self.ranks.values(), self.weights.values()
        numbers, uniform = sum(w.numbers for w in weights), sum(w.uniform for w in weights)
        return (
            f"ranks by energy ({self.direction}): {min(ranks)} to {max(ranks)}, "
            f"{numbers:,} numbers; r = {self.r} everywhere: {uniform:,}"
        )


def inspection(
    model: str, config: InlayConfig, direction: Direction, revision: str | None = None, trust_remote_code: bool = False
) -> Inspection:
    """Spectra and ranks of the modules that a config adapts.

    Raises:
        ValueError: the model or the config cannot be used, or the method has no rank.
    """
    r = rank_of(config)
    shapes = spectra.targets(model, config, trust_remote_code)
    values = spectra.spectra(model, shapes, revision, trust_remote_code)
    cost = cost_of(config, shapes)
    ranks = allocate(values, r, cost, direction)
    weights = {
        name: Weight(shapes[name], values[name], ranks[name], cost(name, ranks[name]), cost(name, r)) for name in shapes
    }
    return Inspection(model, str(config.method), r, direction, weights)


def thresholded(recipe: Recipe, console: Console) -> dict[str, int]:
    """WeLore's ranks of a recipe's modules."""
    config = recipe.config()
    shapes = spectra.targets(recipe.model, config, recipe.trust_remote_code)
    values = spectra.spectra(recipe.model, shapes, recipe.revision, recipe.trust_remote_code)
    r, cost = rank_of(config), cost_of(config, shapes)
    found = by_threshold(values, r, cost)
    numbers, uniform = (sum(cost(n, rank) for n, rank in each.items()) for each in (found, dict.fromkeys(found, r)))
    console.print(
        f"ranks by threshold (WeLore): {min(found.values())} to {max(found.values())}, {numbers:,} numbers; "
        f"r = {r} everywhere: {uniform:,}"
    )
    return found


def rank_of(config: InlayConfig) -> int:
    """A config's r.

    Raises:
        ValueError: its method has none.
    """
    method = config.build()
    if method.shared:
        shared = ", ".join(sorted(method.shared))
        raise ValueError(f"{method.name} shares {shared} between layers, so no layer has a rank of its own to allocate")
    r = {f.name: getattr(method, f.name) for f in fields(method)}.get("r")
    if r is None:
        raise ValueError(f"{method.name} has no rank r to allocate; choose a method with one, such as lamda or lora")
    return r


def cost_of(config: InlayConfig, shapes: Mapping[str, Shape]) -> Callable[[str, int], int]:
    """The numbers that a config's method trains on a module at a rank, asked of the method itself on a meta tensor."""
    method: Any = config.build()

    @functools.cache
    def count(shape: Shape, rank: int) -> int:
        start = replace(method, r=rank).start(torch.empty(shape, device="meta"))
        return sum(p.numel() for symbol, p in start.items() if symbol not in method.frozen)

    return lambda name, rank: count(shapes[name], rank)


def patterns(ranks: Mapping[str, int], key: str = "r") -> dict[str, dict[str, int]]:
    """Ranks (or another `key`) as a recipe's `patterns`: regexes for whole names, of which one takes all layers
    with the same rank."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for name, rank in ranks.items():
        head, index, tail = split(name)
        groups.setdefault((head, tail, rank), []).append(index)
    # ^, because a pattern may otherwise match the end of a longer name
    return {
        f"^{re.escape(head)}{any_of(indices)}{re.escape(tail)}": {key: rank}
        for (head, tail, rank), indices in groups.items()
    }


def any_of(words: list[str]) -> str:
    """A regex for one of several words without special characters."""
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def split(name: str) -> tuple[str, str, str]:
    """A module's name before, at and after its layer's index, the first number among its components."""
    found = re.match(r"(|.*?\.)(\d+)(\..*|)$", name)
    return (found[1], found[2], found[3]) if found else (name, "", "")


def depth(name: str) -> int:
    """The index of a module's layer; -1 outside of the layers (a head)."""
    return int(split(name)[1] or -1)


def part_of(name: str) -> str:
    """A module's name within its layer, the same for all experts of one kind."""
    head, _, tail = split(name)
    return re.sub(r"\.\d+(?=\.|$)", "", tail.strip(".") or head.strip("."))


def settle(recipe: Recipe, console: Console) -> Recipe:
    """The recipe with its ranks allocated: explicit in `patterns`, so that it runs again, and its adapter loads,
    without any spectra.

    Raises:
        ValueError: the model cannot be read, or does not fit the recipe.
    """
    if recipe.allocate in ("none", "variance", "blocks"):  # these wait for data: `calibration.settle`
        return recipe
    if recipe.allocate == "welore":
        return replace(recipe, allocate="none", patterns=patterns(thresholded(recipe, console)))
    direction: Direction = "peaked" if recipe.allocate == "energy_peaked" else "flat"
    found = inspection(recipe.model, recipe.config(), direction, recipe.revision, recipe.trust_remote_code)
    console.print(found.summary())
    return replace(recipe, allocate="none", patterns=patterns(found.ranks))
