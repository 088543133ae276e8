"""The weights of experts as a checkpoint stores them: fused, as the model holds them, or a matrix for each expert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from inlay.host import seal
from inlay.host.experts import ExpertWeight, InlayExperts
from inlay.host.layer import InlayLinear, change_of
from inlay.models.stored_weights import Weights

PARTS = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1, "w2": 0, "down_proj": 0}  # names of matrices, and their order


class Piece(NamedTuple):
    """Say what a stored tensor holds of the parameter `module`: some rows of one expert, or (None) all of it."""

    module: str
    expert: int | None = None
    rows: slice = slice(None)


class ExpertFiles:
    """Read the weights of experts, one parameter at a time.

    Args:
        weights: the checkpoint.
        parameters: those of a model without memory, by name.
    """

    def __init__(self, weights: Weights, parameters: Mapping[str, ExpertWeight]) -> None:
        self.weights = weights
        self.parameters = parameters
        self.pieces: dict[str, Piece] = {}
        for name, parameter in parameters.items():
            fused = weights.key(name)
            self.pieces |= {fused: Piece(name)} if fused else self.pieces_of(name, parameter)
        self.read: dict[str, Tensor] = {}

    def pieces_of(self, name: str, parameter: ExpertWeight) -> dict[str, Piece]:
        """Return what each stored matrix holds of a parameter that is stored expert by expert.

        Raises:
            ValueError: it is stored in another way.
        """
        found: dict[tuple[int, int], str] = {}
        for key in self.weights.converted.get(name, ()):
            if (match := re.search(r"\.(\d+)\.(\w+)\.weight$", key)) and match[2] in PARTS:
                found[int(match[1]), PARTS[match[2]]] = key
        count = 1 + max((part for _, part in found), default=-1)
        every = {(e, part) for e in range(parameter.count) for part in range(count)}
        if not count or found.keys() != every:
            raise ValueError(
                f"the checkpoint of {self.weights.model!r} stores {name} in a layout that is not known here; merge in "
                "Python: PeftModel.from_pretrained(...).merge_and_unload()"
            )
        step = parameter.out_features // count
        return {key: Piece(name, e, slice(part * step, (part + 1) * step)) for (e, part), key in found.items()}

    def whole(self, name: str) -> Tensor:
        """Return a parameter, (E, out, in), as it is stored; what was read of other layers is forgotten."""
        if name not in self.read:
            beside = name.rpartition(".")[0]
            self.read = {n: W for n, W in self.read.items() if n.rpartition(".")[0] == beside}
            parts: dict[int | None, list[tuple[int, str]]] = {}
            for key, piece in self.pieces.items():
                if piece.module == name:
                    parts.setdefault(piece.expert, []).append((piece.rows.start or 0, key))
            if None in parts:
                W = self.parameters[name].matrices(self.weights.read(parts[None][0][1]))
            else:
                experts = (torch.cat([self.weights.read(key) for _, key in sorted(parts[e])]) for e in sorted(parts))  # type: ignore[type-var]
                W = torch.stack(list(experts))
            self.check(name, W)
            self.read[name] = W
        return self.read[name]

    def check(self, name: str, W: Tensor) -> None:
        """Look at a parameter that was read."""


class StoredExperts(ExpertFiles):
    """Read the base weights of adapted experts, which are what the adapter was cut from, and merge it into them.

    Args:
        weights: the checkpoint.
        layers: the adapted layers by their modules' names, others than experts among them.
    """

    def __init__(self, weights: Weights, layers: Mapping[str, InlayLinear]) -> None:
        self.layers = {name: layer for name, layer in layers.items() if isinstance(layer, InlayExperts)}
        super().__init__(weights, {name: layer.base_layer for name, layer in self.layers.items()})

    def check(self, name: str, W: Tensor) -> None:
        self.layers[name].check_base("default", seal.of_base(W))

    def merged(self, key: str, dtype: torch.dtype | None) -> tuple[Tensor, float]:
        """Return a stored tensor with the adapter in it, and the share of the change that rounding it lost."""
        piece = self.pieces[key]
        layer, W = self.layers[piece.module], self.whole(piece.module)
        parts, experts = layer.parts("default"), range(len(W)) if piece.expert is None else [piece.expert]
        values = []
        lost = moved = 0.0
        for e in experts:
            old = W[e].float()
            change = change_of(*parts[e], old)[piece.rows] if e in parts else torch.zeros_like(old[piece.rows])
            exact = old[piece.rows] + change
            rounded = exact.to(dtype or W.dtype)
            if not rounded.isfinite().all():
                raise ValueError(f"the merged {key} does not fit {rounded.dtype}; choose the dtype bfloat16 or float32")
            lost += (rounded.float() - exact).square().sum().item()
            moved += change.square().sum().item()
            values.append(rounded)
        value = values[0] if piece.expert is not None else layer.base_layer.matrices(torch.stack(values))
        return value.contiguous(), (lost / max(moved, torch.finfo(torch.float32).tiny)) ** 0.5
