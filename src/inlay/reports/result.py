"""What a run gave, and with what it ran."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inlay.recipe.recipe import Recipe


@dataclass
class Result:
    """What a run gave. Losses are means over answer tokens of the held-out examples; seconds are of training alone."""

    recipe: Recipe
    folder: Path
    parameters: int
    base_parameters: int
    before: float
    after: float
    seconds: float
    tokens: int
    memory: int
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the task, before and after
    labels: int | None = None  # of a classification
    memory_planned: dict[str, float] = field(default_factory=dict)  # bytes at the peak of a step, by part


def environment() -> dict[str, str]:
    """The versions a run depends on."""
    names = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
