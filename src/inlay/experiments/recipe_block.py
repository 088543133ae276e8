"""Read the block of a recipe that lists what many runs differ in."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from inlay.messages import did_you_mean
from inlay.recipe.reading import import_named, read_yaml
from inlay.recipe.recipe import Recipe
from inlay.recipe.schema import conform

ELSEWHERE = ("early_stopping", "keep_best", "save_every", "push_to_hub")  # fields for single runs only


def positive_numbers(name: str, values: list[object]) -> list[float]:
    """Convert the `values` of the field `name` to numbers above 0."""
    numbers = [conform(name, float, value) for value in values]
    if any(number <= 0 for number in numbers):
        raise ValueError(f"{name}: {min(numbers)} is not above 0")
    return numbers


def read_block(path: str, name: str, cls: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe fields of a YAML file, and its block `name`, whose keys are fields of `cls`.

    The modules of methods that the file names under `import` are imported: it is what its user runs.

    Raises:
        ValueError: the file, the block or a key of it cannot be used.
    """
    values = read_yaml(path)
    import_named(values, path)
    block = values.pop(name, None) or {}
    names = [f.name for f in fields(cls)]
    if not isinstance(block, dict):
        raise ValueError(f"{path}: {name} must be a mapping, not {block!r}")
    for key in block:
        if key not in names:
            raise ValueError(f"{path}: {name} has no {key!r}; {did_you_mean(key, names)}")
    return values, block


def check_held_whole(recipe: Recipe) -> None:
    """Raise a ValueError for streamed data: trials draw their examples from the whole data set."""
    if recipe.streaming:
        raise ValueError("streaming is for inlay train: trials draw their examples from all there are; leave it out")
