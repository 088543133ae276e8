"""Define what a run returns, and the versions it ran with."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inlay.recipe.recipe import Recipe


@dataclass
class Result:
    """Hold the result of a run.

    Attributes:
        recipe, folder: of the run.
        parameters, base_parameters: trained, and of the base.
        before, after: mean losses over the answer tokens of the held-out examples.
        seconds, tokens, memory: of training alone; memory in bytes, at its peak.
        history: the metrics that were logged.
        samples: held-out prompts with their answers.
        scores: of the task, before and after.
        labels: of a classification, how many.
        memory_planned: predicted bytes at the peak of a step, by part.
    """

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
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    labels: int | None = None
    memory_planned: dict[str, float] = field(default_factory=dict)


def environment() -> dict[str, str]:
    """Return the versions that a run depends on."""
    names = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
