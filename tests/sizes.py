"""Hyperparameters with which every method fits models as small as those of the tests, and of PEFT's."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

import torch

from inlay.methods import METHODS, find


def sized(name: str, size: int) -> dict[str, Any]:
    """Hyperparameters of a method with a size, or with the least that it takes; none where it has no size."""
    key = find(name).size
    least = {f.name: f.metadata.get("min", size) for f in fields(find(name))}
    return {} if key is None else {key: max(size, least[key])}


def fitting(name: str, size: int, *shapes: tuple[int, int]) -> dict[str, Any] | None:
    """The same with the largest size up to `size`, or the least there is above it, that fits weights of all these
    shapes; None where none does.
    """
    for asked in range(size, 0, -1):
        args = sized(name, asked)
        with suppress(ValueError):
            for shape in shapes:
                find(name)(**args).start(torch.empty(shape, device="meta"))
            return args
    return None


SIZES: dict[str, dict[str, Any]] = {method.name: sized(method.name, 4) for method in METHODS}
DEPARTS = {method.name for method in METHODS if method.departs}  # these do not start at the pretrained model
