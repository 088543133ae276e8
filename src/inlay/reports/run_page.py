"""Build what a person reads after a run: the samples and a page that needs no network."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import fields

from inlay._version import __version__
from inlay.inspection.changes import FIELDS, WeightChange, by_type
from inlay.messages import gib, one_line, printable
from inlay.models.builtin import MODEL, model_name
from inlay.recipe.peft_methods import is_inlay
from inlay.recipe.recipe import Recipe
from inlay.recipe.sources import source_names
from inlay.reports.html import SORT, html_cell, html_document, sortable_table
from inlay.reports.result import Result, environment

CAPTIONS = {
    "loss": "Training and held-out loss per step",
    "changes": "Where the weights changed: ‖ΔW‖ / ‖W‖",
    "principal": "How much of each change lies in the principal eighth of its weight's spectrum",
    "minor": "How much of each change lies in the minor eighth",
    "ranks": "Ranks",
    "spectra": "Spectra before and after, coloured where the change lies",
    "memory": "Memory, predicted and measured",
}


def page_title(result: Result) -> str:
    """Return one line with the method, the base and the share that was trained."""
    share = result.parameters / result.base_parameters
    return f"{result.recipe.method} on {model_name(result.recipe.model)}: {share:.2%} of its size trained"


def run_facts(result: Result) -> dict[str, str]:
    """Return the table at the head of the page and of the model card."""
    recipe = result.recipe
    return {
        "Base model": model_name(recipe.model) + (" (built in)" if recipe.model == MODEL else ""),
        **about_method(recipe),
        "Trained": f"{result.parameters:,} of {result.base_parameters:,} parameters",
        "Data": "E2E NLG (built in)" if recipe.data == MODEL else source_names(recipe),
        "Held-out loss": f"{result.before:.3f} before, {result.after:.3f} after",
        **{name: f"{then:.3f} before, {now:.3f} after" for name, (then, now) in result.scores.items()},
        "Training": f"{result.seconds:.0f} s, {result.tokens:,} tokens, {gib(result.memory)} peak memory",
    }


def about_method(recipe: Recipe) -> dict[str, str]:
    """Return what the method is, and its hyperparameters."""
    if not is_inlay(recipe.method):
        values = ", ".join(f"{name}={value}" for name, value in recipe.args.items())
        return {"Method": recipe.method, "Hyperparameters": values or "the defaults"}
    method = recipe.config().build()
    values = {f.name: vars(method)[f.name] for f in fields(method) if vars(method)[f.name] is not None}
    return {
        "Method": method.title,
        "Equation": method.equation,
        "Paper": method.paper,
        "Hyperparameters": ", ".join(f"{name}={value}" for name, value in values.items()),
    }


def samples_text(result: Result) -> str:
    """Return `samples.md`: held-out prompts with the answers before and after."""
    lines = [f"# {one_line(page_title(result))}", "", "Held-out prompts, greedy answers.", ""]
    for row in result.samples:
        lines += [f"**Prompt** {row['prompt']}", ""]
        lines += [f"- **{name}** {' '.join(row[name].split())}" for name in ("before", "after", "reference")]
        lines += [""]
    return printable("\n".join(lines))


def run_page(result: Result, pictures: Mapping[str, str], changed: Mapping[str, WeightChange]) -> str:
    """Return `report.html`: one self-contained file with the plots of the run, and what it changed."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in run_facts(result).items())
    parts = {name: f"<h2>{CAPTIONS[name]}</h2>{picture}" for name, picture in pictures.items()}
    if changed:
        parts["changes"] += change_table(changed)
    loss = parts.pop("loss", "")
    return html_document(
        page_title(result),
        f"""<table>{rows}</table>
{loss}
{samples_table(result) if result.samples else ""}
{"".join(parts.values())}
<h2>Recipe</h2><p>Repeat the run with <code>inlay train recipe.yaml</code>.</p>
<details><summary>recipe.yaml</summary><pre>{html.escape(result.recipe.to_yaml())}</pre></details>
<details><summary>Versions</summary><pre>{html.escape(versions())}</pre></details>
<script>{SORT}</script>""",
    )


def samples_table(result: Result) -> str:
    """Return the section with the held-out prompts and their answers."""
    names = ("prompt", "before", "after", "reference")
    head = "".join(f"<th>{name}</th>" for name in names)
    cells = [[f'<td data-name="{name}">{html.escape(row[name])}</td>' for name in names] for row in result.samples]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    table = f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
    return f"<h2>Held-out prompts, before and after</h2>{table}"


def change_table(changed: Mapping[str, WeightChange]) -> str:
    """Return a sortable table with a row per type of module, medians over its weights."""
    body = ""
    for kind, count, values, trained in by_type(changed):
        cells = [html_cell(kind, kind), html_cell(str(count), count)]
        cells += [report_number(value, form) for value, (_, _, form) in zip(values, FIELDS, strict=True)]
        body += f"<tr>{''.join(cells)}{html_cell(f'{trained:,}', trained)}</tr>"
    return sortable_table(("module", "weights", *(head for _, head, _ in FIELDS), "trained"), body)


def report_number(value: float | None, form: str) -> str:
    """Return a cell with a formatted number; an empty one for None."""
    return html_cell("", math.nan) if value is None else html_cell(f"{value:{form}}", value)


def versions() -> str:
    """Return the environment of the run, one version per line."""
    return "\n".join(f"{name} {number}" for name, number in {"inlay": __version__, **environment()}.items())
