"""Generate docs/recipe.md from the fields of a recipe."""

from __future__ import annotations

import json
from dataclasses import fields

from inlay.recipe.reading import hyperparameters
from inlay.recipe.recipe import Recipe
from inlay.recipe.schema import default_of


def recipe_reference() -> str:
    """Return the text of docs/recipe.md: every field with its default and what it means."""
    from inlay.experiments.compare.spec import Comparison
    from inlay.experiments.tune.spec import Rescore, SearchSpec

    rows, compare, tune, rescore = (
        [f"| `{f.name}` | `{json.dumps(default_of(f))}` | {f.metadata['help']} |" for f in fields(cls)]
        for cls in (Recipe, Comparison, SearchSpec, Rescore)
    )
    hyper = [f"| `{name}` | {text} |" for name, text in sorted(hyperparameters().items())]
    lines = ["# Every field of a recipe", "", "Each is a YAML key and a flag (`learning_rate` is `--learning-rate`)."]
    lines += ["", "| field | default | meaning |", "|---|---|---|", *rows]
    lines += [
        "",
        "Hyperparameters of methods go under `args`, or are flags:",
        "",
        "| name | meaning |",
        "|---|---|",
        *hyper,
        "",
        "`inlay compare` reads a recipe of what all runs share, and these under `compare`:",
        "",
        "| field | default | meaning |",
        "|---|---|---|",
        *compare,
        "",
        "`inlay tune` reads a recipe of what all trials share, and these under `tune`:",
        "",
        "| field | default | meaning |",
        "|---|---|---|",
        *tune,
        *[row.replace("`", "`rescore.", 1) for row in rescore],
    ]
    return "\n".join(lines) + "\n"
