"""What a person looks at after a run: the loss plot, the samples, a page without network, the model card."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from inlay import __version__
from inlay.workbench import kinds
from inlay.workbench.builtin import MODEL
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
img { max-width: 100%; background: white; } pre { overflow-x: auto; padding: 1rem; border: 1px solid var(--line); }
"""

CAPTIONS = {
    "loss": "Training and held-out loss per step",
    "changes": "Where the weights changed: ‖ΔW‖ / ‖W‖",
    "principal": "How much of each change lies in the principal eighth of its weight's spectrum",
    "minor": "How much of each change lies in the minor eighth",
    "ranks": "Ranks",
    "memory": "Memory, predicted and measured",
}

MERGING = "\nTo serve it without Inlay, merge it first: `inlay merge path/to/this/folder merged/`.\n"


def plot_loss(result: Result, path: Path) -> None:
    """Training loss per step with the held-out loss over it, as PNG (and SVG beside it)."""
    matplotlib.rcParams["svg.hashsalt"] = "inlay"  # the same run draws the same file
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    steps = [(row["step"], row["loss"]) for row in result.history if "loss" in row]
    held = [(row["step"], row["eval_loss"]) for row in result.history if "eval_loss" in row]
    axes.plot(*zip(*steps, strict=True), color="#7fa8d1", linewidth=1, alpha=0.6, label="training batch")
    axes.plot(*zip(*smooth(steps), strict=True), color="#2b6ca3", label="training, smoothed")
    mark = "o--" if len(held) > 2 else "o"  # a line through two points would claim a course
    axes.plot(*zip(*held, strict=True), mark, color="#b03a2e", linewidth=1, label="held-out examples")
    for step, loss in (held[0], held[-1]):
        axes.annotate(
            f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(0, 8), color="#b03a2e", ha="center"
        )
    axes.set(xlabel="optimiser step", ylabel=kinds.find(result.recipe.task).loss, title=title(result))
    axes.margins(0.05, 0.12)
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def smooth(points: list[tuple[int, float]], weight: float = 0.85) -> list[tuple[int, float]]:
    """An exponential mean without the pull of its start."""
    made, mean, mass = [], 0.0, 0.0
    for step, loss in points:
        mean, mass = weight * mean + (1 - weight) * loss, weight * mass + 1 - weight
        made.append((step, mean / mass))
    return made


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


def picture(result: Result, name: str) -> str:
    """A plot of the run, inside the page."""
    data = base64.b64encode((result.folder / "plots" / f"{name}.png").read_bytes()).decode()
    return f'<figure><img alt="{html.escape(CAPTIONS[name])}" src="data:image/png;base64,{data}"></figure>'


def page(result: Result, plots: Sequence[str] = ()) -> str:
    """`report.html`: one self-contained file; `plots`: those of the run beside its loss."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts(result).items())
    names = ("prompt", "before", "after", "reference")
    head = "".join(f"<th>{name}</th>" for name in names)
    cells = [[f'<td data-name="{name}">{html.escape(row[name])}</td>' for name in names] for row in result.samples]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return document(
        title(result),
        f"""<table>{rows}</table>
<h2>Loss</h2>{picture(result, "loss")}
{"".join(f"<h2>{CAPTIONS[name]}</h2>{picture(result, name)}" for name in plots)}
<h2>Held-out prompts, before and after</h2><div class="wide"><table><tr>{head}</tr>{body}</table></div>
<h2>Recipe</h2><pre>{html.escape(result.recipe.to_yaml())}</pre>
<h2>Versions</h2><pre>{html.escape(versions())}</pre>""",
    )


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
