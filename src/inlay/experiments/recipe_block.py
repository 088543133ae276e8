"""The block of a recipe that says what many runs differ in."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from inlay.messages import did_you_mean
from inlay.recipe.reading import read_yaml
from inlay.recipe.recipe import Recipe
from inlay.recipe.schema import conform

ELSEWHERE = ("early_stopping", "keep_best", "save_every", "push_to_hub")  # of single runs only


def positive_numbers(name: str, values: list[Any]) -> list[float]:
    """Numbers above 0."""
    numbers = [conform(name, float, value) for value in values]
    if any(number <= 0 for number in numbers):
        raise ValueError(f"{name}: {min(numbers)} is not above 0")
    return numbers


def read_block(path: str, name: str, cls: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a YAML file says of a recipe, and its block `name`, whose keys are fields of `cls`.

    Raises:
        ValueError: the file, the block or a key of it cannot be used.
    """
    values = read_yaml(path)
    given, names = values.pop(name, None) or {}, [f.name for f in fields(cls)]
    if not isinstance(given, dict):
        raise ValueError(f"{path}: {name} must be a mapping, not {given!r}")
    for key in given:
        if key not in names:
            raise ValueError(f"{path}: {name} has no {key!r}; {did_you_mean(key, names)}")
    return values, given


def check_held_whole(recipe: Recipe) -> None:
    """Raise a ValueError for data that is not held whole: trials draw their examples from all there are."""
    if recipe.streaming:
        raise ValueError("streaming is for inlay train: trials draw their examples from all there are; leave it out")
