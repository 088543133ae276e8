"""Generate docs/recipe.md and resources/flags.json from the fields of a recipe and of the methods.

python -m inlay.cli.recipe_reference
"""

from __future__ import annotations

import json
import typing
from dataclasses import fields
from pathlib import Path

from inlay.cli.flags import FILE
from inlay.methods import METHODS
from inlay.recipe.reading import hyperparameters
from inlay.recipe.recipe import Recipe
from inlay.recipe.schema import default_of, yaml_key


def recipe_reference() -> str:
    """Return the text of docs/recipe.md: every field with its default and what it means."""
    from inlay.experiments.compare.spec import Comparison
    from inlay.experiments.tune.spec import Rescore, SearchSpec

    rows, compare, tune, rescore = (
        [f"| `{yaml_key(f)}` | `{json.dumps(default_of(f))}` | {f.metadata['help']} |" for f in fields(cls)]
        for cls in (Recipe, Comparison, SearchSpec, Rescore)
    )
    hyper = [f"| `{name}` | {text} |" for name, text in sorted(hyperparameters(METHODS).items())]
    about = "Every field is a key of a YAML recipe, and a flag of `inlay train` (`learning_rate` is `--learning-rate`)."
    lines = ["# Every field of a recipe", "", about]
    lines += ["", "| field | default | meaning |", "|---|---|---|", *rows]
    lines += [
        "",
        "A method's hyperparameters go under `args` in a recipe, or are flags:",
        "",
        "| name | meaning |",
        "|---|---|",
        *hyper,
        "",
        "`inlay compare` reads a recipe that all its runs share, and these fields under `compare`:",
        "",
        "| field | default | meaning |",
        "|---|---|---|",
        *compare,
        "",
        "`inlay tune` reads a recipe that all its trials share, and these fields under `tune`:",
        "",
        "| field | default | meaning |",
        "|---|---|---|",
        *tune,
        *[row.replace("`", "`rescore.", 1) for row in rescore],
    ]
    return "\n".join(lines) + "\n"


def flag_table() -> str:
    """Return the text of resources/flags.json: what the command line says of fields and hyperparameters."""
    hints = typing.get_type_hints(Recipe)
    rows = {}
    for f in fields(Recipe):
        if f.name == "imports":  # a flag of every verb
            continue
        default = default_of(f)
        text = None if default is None or default in ({}, []) else str(json.dumps(default)).strip('"')
        rows[f.name] = {"help": f.metadata["help"], "default": text, "switch": hints[f.name] is bool}
    for name, text in sorted(hyperparameters(METHODS).items()):
        defaults = {repr(f.default) for method in METHODS for f in fields(method) if f.name == name}
        default = defaults.pop().strip("'") if len(defaults) == 1 else "the method's"
        rows[name] = {"help": text, "default": None if default == "None" else default, "switch": False}
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(flag_table(), encoding="utf-8")
    Path("docs/recipe.md").write_text(recipe_reference(), encoding="utf-8")
