"""Hyperparameters with which every method fits models as small as those of the tests, and of PEFT's."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

import torch

from inlay.methods import METHODS, find

SIZES: dict[str, dict[str, Any]] = {
    **{method.name: {"r": 4} for method in METHODS},
    **{name: {"r": 16} for name in ("bat", "bat_col", "randlora")},
    "dota": {"bond": 4},
}


def fitting(name: str, size: int, *shapes: tuple[int, int]) -> dict[str, Any] | None:
    """The same hyperparameters with the largest size up to `size`, or the least there is above it, that fits weights of
    all these shapes; None where none does.
    """
    method = find(name)
    least = {f.name: f.metadata.get("min", 1) for f in fields(method)}
    for asked in range(size, 0, -1):
        args = {key: max(asked, least[key]) for key in SIZES[name]}
        with suppress(ValueError):
            for shape in shapes:
                method(**args).start(torch.empty(shape, device="meta"))
            return args
    return None
