"""What a person reads after a run: the samples, a page without network, the model card."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from inlay import __version__
from inlay.workbench import kinds
from inlay.workbench.builtin import MODEL
from inlay.workbench.changes import FIELDS, Change, by_type
from inlay.workbench.memory import gib
from inlay.workbench.peft_methods import FULL, is_ours
from inlay.workbench.recipe import Recipe
from inlay.workbench.result import Result, environment

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); }
@media (max-width: 40rem) { .wide th { display: none; } .wide td { display: block; border: 0; padding: .2rem 0; }
  .wide td::before { content: attr(data-name) ": "; font-weight: 600; }
  .wide tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--line); } }
.scroll { overflow-x: auto; } .scroll table { white-space: nowrap; font-variant-numeric: tabular-nums; }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: Canvas; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: calc(var(--inches) * 96px); min-width: calc(var(--inches) * 68px); max-width: 100%; height: auto; }
pre { overflow-x: auto; padding: 1rem; border: 1px solid var(--line); }
"""

SORT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th").forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", body = table.tBodies[0];
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value, number = row => key(row) === "" ? Infinity : Number(key(row));
    const order = (a, b) => number(a) - number(b) || key(a).localeCompare(key(b));
    const text = (a, b) => key(a).localeCompare(key(b));
    const numeric = [...body.rows].every(row => !Number.isNaN(number(row)));
    body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * (numeric ? order : text)(a, b)));
  }));
"""
CAPTIONS = {
    "loss": "Training and held-out loss per step",
    "changes": "Where the weights changed: ‖ΔW‖ / ‖W‖",
    "principal": "How much of each change lies in the principal eighth of its weight's spectrum",
    "minor": "How much of each change lies in the minor eighth",
    "ranks": "Ranks",
    "spectra": "Spectra before and after, coloured where the change lies",
    "memory": "Memory, predicted and measured",
}

MERGING = "\nTo serve it without Inlay, merge it first: `inlay merge path/to/this/folder merged/`.\n"


def title(result: Result) -> str:
    """One line: method, base, what it trains."""
    share = result.parameters / result.base_parameters
    return f"{result.recipe.method} on {model_name(result.recipe.model)}: {share:.2%} of its size trained"


def model_name(name: str) -> str:
    """A model in a few words."""
    return "SmolLM2-135M-Instruct" if name == MODEL else Path(name).name


def facts(result: Result) -> dict[str, str]:
    """The table at the head of the page and the card."""
    recipe = result.recipe
    return {
        "Base model": model_name(recipe.model) + (" (built in)" if recipe.model == MODEL else ""),
        **about_method(recipe),
        "Trained": f"{result.parameters:,} of {result.base_parameters:,} numbers",
        "Data": "E2E NLG (built in)" if recipe.data == MODEL else recipe.data,
        "Held-out loss": f"{result.before:.3f} before, {result.after:.3f} after",
        **{name: f"{then:.3f} before, {now:.3f} after" for name, (then, now) in result.scores.items()},
        "Training": f"{result.seconds:.0f} s, {result.tokens:,} tokens, {gib(result.memory)} peak memory",
    }


def about_method(recipe: Recipe) -> dict[str, str]:
    """What the method is, and with what values."""
    if not is_ours(recipe.method):
        values = ", ".join(f"{name}={value}" for name, value in recipe.args.items())
        return {"Method": recipe.method, "Hyperparameters": values or "the defaults"}
    method = recipe.config().build()
    return {
        "Method": method.title,
        "Equation": method.equation,
        "Paper": method.paper,
        "Hyperparameters": repr(method),
    }


def samples_text(result: Result) -> str:
    """`samples.md`: held-out prompts answered before and after."""
    lines = [f"# {title(result)}", "", "Held-out prompts, greedy answers.", ""]
    for row in result.samples:
        lines += [f"**Prompt** {row['prompt']}", ""]
        lines += [f"- **{name}** {' '.join(row[name].split())}" for name in ("before", "after", "reference")]
        lines += [""]
    return "\n".join(lines)


def page(result: Result, pictures: Mapping[str, str], found: Mapping[str, Change]) -> str:
    """`report.html`: one self-contained file, with the plots of the run, and what it changed."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts(result).items())
    names = ("prompt", "before", "after", "reference")
    head = "".join(f"<th>{name}</th>" for name in names)
    cells = [[f'<td data-name="{name}">{html.escape(row[name])}</td>' for name in names] for row in result.samples]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    parts = {name: f"<h2>{CAPTIONS[name]}</h2>{picture}" for name, picture in pictures.items()}
    if found:
        parts["changes"] += change_table(found)
    return document(
        title(result),
        f"""<table>{rows}</table>
{"".join(parts.values())}
<h2>Held-out prompts, before and after</h2><div class="wide"><table><tr>{head}</tr>{body}</table></div>
<h2>Recipe</h2><p>Repeat it with <code>inlay train recipe.yaml</code>, recipe.yaml being</p>
<pre>{html.escape(result.recipe.to_yaml())}</pre>
<h2>Versions</h2><pre>{html.escape(versions())}</pre>
<script>{SORT}</script>""",
    )


def change_table(found: Mapping[str, Change]) -> str:
    """A row per type of module, medians over its weights; sorted by a click."""
    body = ""
    for kind, count, values, trained in by_type(found):
        cells = [cell(kind, kind), cell(str(count), count)]
        cells += [number(value, form) for value, (_, _, form) in zip(values, FIELDS, strict=True)]
        body += f"<tr>{''.join(cells)}{cell(f'{trained:,}', trained)}</tr>"
    return sortable(("module", "weights", *(head for _, head, _ in FIELDS), "trained"), body)


def number(value: float | None, form: str) -> str:
    """A cell with a number, or none."""
    return cell("", math.nan) if value is None else cell(f"{value:{form}}", value)


def sortable(heads: Sequence[str], body: str) -> str:
    """A table that a click on a head sorts, of rows of `cell`s."""
    head = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in heads)
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def cell(text: str, value: str | float) -> str:
    """A cell, and what it is sorted by; empty where there is no number."""
    missing = isinstance(value, float) and math.isnan(value)
    return f'<td data-value="{"" if missing else html.escape(str(value))}">{"" if missing else html.escape(text)}</td>'


def document(title: str, body: str, style: str = "") -> str:
    """A page of its own, under its title."""
    name = html.escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><style>{STYLE}{style}</style></head><body>
<h1>{name}</h1>
{body}
</body></html>
"""


def versions() -> str:
    """The environment of the run, a line each."""
    return "\n".join(f"{name} {number}" for name, number in {"inlay": __version__, **environment()}.items())


def loader_of(result: Result) -> str:
    """The class of transformers or PEFT that loads what was trained."""
    name = kinds.find(result.recipe.task).auto.__name__
    if result.recipe.method == FULL:
        return name
    return name.replace("Auto", "AutoPeft", 1) if "ImageText" not in name else "AutoPeftModel"


def card(result: Result) -> str:
    """The README, for the hub, of what was trained."""
    name, method = result.recipe.model, result.recipe.method
    base = f"base_model: {name}\n" if not os.path.exists(name) and "/" in name else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in facts(result).items())
    kind = kinds.find(result.recipe.task)
    library, loader = "transformers" if method == FULL else "peft", loader_of(result)
    own = method != FULL and kind.peft == kinds.SEQUENCE
    more = f", num_labels={result.labels}" if own else ""
    register = "import inlay  # makes PEFT know the adapter type\n" if is_ours(method) else ""
    merging = "" if method == FULL else MERGING
    return f"""---
{base}library_name: {library}
pipeline_tag: {kind.tag}
tags: [inlay, "{method}"]
---
# {title(result)}

| | |
|---|---|
{table}

```python
{register}from {library} import {loader}

model = {loader}.from_pretrained("path/to/this/folder"{more})
```
{merging}
Recipe:

```yaml
{result.recipe.differences()}```

Versions: {", ".join(versions().splitlines())}
"""
