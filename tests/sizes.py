"""Hyperparameters with which every method fits models as small as those of the tests, and of PEFT's."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from inlay.methods import METHODS, find

SIZES: dict[str, dict[str, Any]] = {
    **{method.name: {"r": 4} for method in METHODS},
    **{name: {"r": 16} for name in ("bat", "bat_col", "randlora")},
    "dota": {"bond": 4},
}


def sized(name: str, size: int) -> dict[str, Any]:
    """The same hyperparameters with another size, or with the least that the method takes."""
    least = {f.name: f.metadata.get("min", size) for f in fields(find(name))}
    return {key: max(size, least[key]) for key in SIZES[name]}
