"""Read recipes from YAML files and command-line flags."""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from inlay.files.atomic import find_again
from inlay.files.fetched import is_url
from inlay.files.untrusted import LENGTH, DamagedFileError, from_yaml, read_regular, regular_file, user_path
from inlay.messages import did_you_mean, similar_paths
from inlay.method import Method
from inlay.methods import every, import_methods, imports
from inlay.outside import MODULE, UnknownMethodError, is_plain_name
from inlay.recipe.recipe import Recipe, by_key
from inlay.recipe.rewards import import_rewards
from inlay.recipe.schema import default_of, describe_type, yaml_key

DATA = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".gz")  # what no recipe is called


def non_defaults(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe that differ from the defaults, without those for the run folder."""
    values = {f.name: value for f in fields(Recipe) if (value := vars(recipe)[f.name]) != default_of(f)}
    return by_key(recipe, {name: value for name, value in values.items() if name not in ("output", "overwrite")})


def load_recipe(path: str | None, overrides: dict[str, Any], follow: bool = True) -> Recipe:
    """Return a recipe read from the YAML file `path` (or none), with `overrides` on top.

    Overrides that are not fields are hyperparameters of the method, and go to `args`.

    Args:
        path: the file, whose `import` is followed, as a recipe is what its user runs.
        overrides: fields and hyperparameters.
        follow: import what the file names; not so where its user did not write it (a run's own, one from a URL).

    Raises:
        ValueError: the file is missing or not a mapping, a key is unknown, a value does not fit, or a module that it
            names cannot be imported.
    """
    values = read_yaml(path) if path else {}
    if overrides.get("reward") is not None:  # a person's own words
        import_rewards(overrides["reward"])
        values.pop("reward", None)
    if path and follow:
        import_named(values, path)
    if "compare" in values:
        raise ValueError(f"{path} is a comparison, not one run; inlay compare runs it")
    if "tune" in values:
        raise ValueError(f"{path} is a search, not one run; inlay tune runs it and writes the best run's best.yaml")
    try:
        return from_values(values, overrides, path)
    except UnknownMethodError:
        named = [module for module in named_modules(values, path) if is_plain_name(module, MODULE)]
        if follow or not named:
            raise
        flags = " ".join(f"--import {module}" for module in named)
        raise ValueError(
            f"unknown method {values.get('method')!r:.100}: its recipe imports {', '.join(named)}, and nothing is "
            f"imported because a file of a run, or from elsewhere, names it; add {flags} (or the path of its file)"
        ) from None


def named_modules(values: dict[str, Any], path: str | None) -> list[str]:
    """Return the modules that a YAML mapping, read from `path`, names under `import`."""
    modules = values.get("import") or []
    modules = [modules] if isinstance(modules, str) else modules
    if not (isinstance(modules, list) and all(isinstance(module, str) for module in modules)):
        raise ValueError(f"{path}: import: {modules!r:.100} is not the name of a module, or a list of names")
    return modules


def import_named(values: dict[str, Any], path: str) -> None:
    """Import what the recipe at `path` names, from its folder or elsewhere: modules of methods, and rewards."""
    folders = [user_path(path).parent]
    for module in named_modules(values, path):
        import_methods(module, folders)
    if values.get("reward") is not None:
        import_rewards(values["reward"], folders)


def from_values(values: dict[str, Any], overrides: dict[str, Any], path: str | None = None) -> Recipe:
    """Return a recipe from the `values` read from `path`, with `overrides` on top, as `load_recipe` does."""
    keys, names = {yaml_key(f): f.name for f in fields(Recipe)}, {f.name for f in fields(Recipe)}
    for key in values:
        if key not in keys:
            hint = did_you_mean(key, keys)
            if key in hyperparameters():
                hint = f"it is a hyperparameter: write it under args, as args: {{{key}: {values[key]!r}}}"
            raise ValueError(f"{path}: unknown key {key!r}; {hint}")
    if not isinstance(values.get("args") or {}, dict):
        raise ValueError(f"{path}: args: {values['args']!r} is not a mapping")
    args = {**(values.get("args") or {}), **{k: v for k, v in overrides.items() if k not in names}}
    rest = {k: v for k, v in overrides.items() if k in names}
    named = {keys[key]: value for key, value in values.items()}
    named["imports"] = list(dict.fromkeys([*named_modules(values, path), *imports()]))
    return Recipe(**{**named, **rest, "args": {**args, **(rest.get("args") or {})}})


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML mapping from the file `path`."""
    if is_url(path):
        raise ValueError(f"recipe {path} is not read: it says what is run on this machine; inlay train has --from-url")
    file = regular_file(find_again(Path(path)))
    if file.suffix in DATA:
        raise ValueError(f"{path} is data, by its name, and no recipe; name it with --data {path}")
    if file.is_dir():
        raise ValueError(
            f"recipe {path} is a folder; give the YAML file in it, as {file / 'recipe.yaml'}, or go on with a run that "
            f"was stopped by inlay train --resume {path}"
        )
    try:
        values = from_yaml(read_regular(file, LENGTH + 1))
    except FileNotFoundError:
        raise ValueError(f"recipe {path} does not exist{similar_paths(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"recipe {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise DamagedFileError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"recipe {path} must be a mapping of fields to values, not a {type(values).__name__}")
    if odd := [key for key in values or {} if not isinstance(key, str)]:
        raise ValueError(f"recipe {path}: the key {odd[0]!r} is not the name of a field")
    return values or {}


def hyperparameters(methods: Sequence[type[Method]] | None = None) -> dict[str, str]:
    """Return the help of the hyperparameters of `methods` (None: of all) that are not recipe fields, by name."""
    own = {f.name for f in fields(Recipe)}
    listed = every() if methods is None else methods
    return {f.name: f.metadata["help"] for m in reversed(listed) for f in fields(m) if f.name not in own}


def from_flag(name: str, text: str) -> Any:
    """Convert the text of the flag `name` to its field's type.

    Text stays text, names with commas become a list where the field is one before it is text, and the rest is read as
    YAML.

    Raises:
        ValueError: the text cannot be read as that type.
    """
    hint = typing.get_type_hints(Recipe).get(name)
    options = typing.get_args(hint) or (hint,)
    if type(None) in options and text in ("null", "none", ""):
        return None
    if not text.strip() and str not in options:
        wanted = f"; give {' or '.join(map(describe_type, options))}" if hint else ""  # a hyperparameter's is not here
        raise ValueError(f"{name}: nothing is given{wanted}")
    names = re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", text)
    texts = str in options[: options.index(list)] if list in options else True
    if names and not texts:
        return [from_yaml(part) for part in text.split(",")]
    flow = {list: ("[", "]"), dict: ("{", "}")}
    read = any(kind in options and text.startswith(ends[0]) and text.endswith(ends[1]) for kind, ends in flow.items())
    if str in options and not read:
        return text
    try:
        value = from_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        hint = _as_mapping(name, text) if dict in options else ""
        if type(error) is yaml.YAMLError:  # ours, which is one line
            hint = f": {error}"
        raise ValueError(
            f"{name}: {text[:60]!r} cannot be read as {' or '.join(map(describe_type, options))}{hint}"
        ) from None
    if options == (dict,) and not isinstance(value, dict):
        raise ValueError(f"{name}: {text[:60]!r} is not a mapping{_as_mapping(name, text)}")
    return value


def _as_mapping(name: str, text: str) -> str:
    """Return the end of an error on a flag whose text is no mapping: the mapping that was meant, to be pasted."""
    flow = "{" + re.sub(r"\s*[=:]\s*", ": ", text.strip("{} ")) + "}"
    try:
        meant = from_yaml(flow)
    except (yaml.YAMLError, ValueError):
        meant = {}
    good = isinstance(meant, dict) and meant and None not in meant.values()
    return f"; write --{name.replace('_', '-')} {shlex.quote(flow if good else '{name: value}')}"
