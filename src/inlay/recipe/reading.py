"""Recipes from YAML files and command-line flags."""

from __future__ import annotations

import difflib
import re
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from inlay.files.untrusted import LENGTH, DamagedFileError, from_yaml
from inlay.methods import METHODS
from inlay.recipe.recipe import Recipe
from inlay.recipe.schema import default_of, describe_type


def non_defaults(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says that is not the default; where it is kept and run is no part of it."""
    values = {f.name: value for f in fields(Recipe) if (value := getattr(recipe, f.name)) != default_of(f)}
    return {name: value for name, value in values.items() if name not in ("output", "overwrite")}


def load_recipe(path: str | None, overrides: dict[str, Any]) -> Recipe:
    """A recipe from a YAML file (or none) with `overrides` on top; hyperparameters of methods go to `args`.

    Raises:
        ValueError: the file is missing or no mapping, a key is unknown, or a value does not fit.
    """
    values = read_yaml(path) if path else {}
    if "compare" in values:
        raise ValueError(f"{path} is a comparison, not one run; inlay compare runs it")
    if "tune" in values:
        raise ValueError(f"{path} is a search, not one run; inlay tune runs it, and writes the best.yaml of one")
    return from_values(values, overrides, path)


def from_values(values: dict[str, Any], overrides: dict[str, Any], path: str | None = None) -> Recipe:
    """A recipe from what was read from `path`, with `overrides` on top; as `load`."""
    names, hyper = [f.name for f in fields(Recipe)], hyperparameters()
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
            if key in hyper:
                hint = f"it is a hyperparameter: write it under args, as args: {{{key}: {values[key]!r}}}"
            raise ValueError(f"{path}: unknown key {key!r}; {hint}")
    if not isinstance(values.get("args") or {}, dict):
        raise ValueError(f"{path}: args: {values['args']!r} is not a mapping")
    args = {**(values.get("args") or {}), **{k: v for k, v in overrides.items() if k in hyper}}
    plain = {k: v for k, v in overrides.items() if k not in hyper}
    return Recipe(**{**values, **plain, "args": {**args, **(plain.get("args") or {})}})


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML mapping from a file."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            values = from_yaml(file.read(LENGTH + 1))  # no more, of what may have no end
    except FileNotFoundError:
        raise ValueError(f"recipe {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"recipe {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter: a date that is none
        raise DamagedFileError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"recipe {path} must be a mapping of fields to values, not a {type(values).__name__}")
    if odd := [key for key in values or {} if not isinstance(key, str)]:
        raise ValueError(f"recipe {path}: the key {odd[0]!r} is no field's name")
    return values or {}


def hyperparameters() -> dict[str, str]:
    """Every hyperparameter of every method that is no recipe field itself, with its help."""
    own = {f.name for f in fields(Recipe)}
    return {f.name: f.metadata["help"] for m in reversed(METHODS) for f in fields(m) if f.name not in own}


def from_flag(name: str, text: str) -> Any:
    """A flag's text as its field's type: text stays text, names with commas become a list where the field is one before
    it is text, the rest is read as YAML.

    Raises:
        ValueError: it cannot be read.
    """
    hint = typing.get_type_hints(Recipe).get(name)
    options = typing.get_args(hint) or (hint,)
    if type(None) in options and text in ("null", "none", ""):
        return None
    names = re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", text)
    texts = str in options[: options.index(list)] if list in options else True
    if names and not texts:
        return [from_yaml(part) for part in text.split(",")]
    if str in options and not (list in options and text.startswith("[") and text.endswith("]")):
        return text
    try:
        return from_yaml(text)
    except (yaml.YAMLError, ValueError):
        raise ValueError(
            f"{name}: {text[:60]!r} cannot be read as {' or '.join(map(describe_type, options))}"
        ) from None
