"""The page of a comparison: one file without network, its plots inline, its table sorted by a click."""

from __future__ import annotations

import html
import math

from inlay._version import __version__
from inlay.evaluation.paired import CONFIDENCE
from inlay.experiments.compare.outcome import Outcome, Standing, machine_name, mean_of, spread_of
from inlay.experiments.compare.plots import comparison_figures
from inlay.files.atomic import write_text
from inlay.inspection.figures import inline_svg, save_figure
from inlay.messages import gib
from inlay.models.builtin import model_name
from inlay.reports.html import SORT, html_cell, html_document, sortable_table

STYLE = """
body { max-width: 84rem; } p, pre { max-width: 60rem; } pre { box-sizing: border-box; }
.scroll td:nth-child(2) { white-space: normal; min-width: 11rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.plots { gap: 1.5rem 2rem; margin-top: 2rem; }
.plots svg { width: 100%; height: auto; } .plots figure[style] svg { max-width: calc(var(--inches) * 96px); }
.plots figure[style] { grid-column: 1 / -1; } figure { margin: 0; }
small { opacity: .7; } pre { font-size: .85rem; } h3 { font-size: 1rem; max-width: 60rem; white-space: pre-line; }
"""
CAPTIONS = {
    "differences": "An interval that crosses the line is no difference beyond noise.",
    "curves": "Training loss, smoothed, mean over seeds.",
    "parameters": "Bars: standard deviation over seeds. Ringed: no other method is better in both.",
    "memory": "Of the whole process, libraries included.",
    "seconds": "Wall time of training on the machine below.",
    "forgetting": "Right is more learned, down is less forgotten.",
    "rates": "The first rung, one seed.",
    "subspaces": "Medians over the weights, and quartiles; the run with the first seed.",
    "maps": "‖ΔW‖ / ‖W‖. The run with the first seed. One scale of colours, logarithmic, for all.",
    "stack": "Predicted as by <code>inlay plan</code>; libraries are in the measured peak of a process alone.",
    "ranks": "Of the methods that have different ones.",
    "spectra": "The middle one of the layers; the run with the first seed. Coloured where the change lies.",
}
QUESTIONS = "Intervals are over seeds, all asked the same: what another draw of questions would change is not in them."


def write_comparison_page(made: Outcome) -> None:
    """report.html, and every plot as PNG and SVG in plots/."""
    folder = made.folder / "plots"
    folder.mkdir(exist_ok=True)
    pictures = []
    for name, figure in comparison_figures(made):
        save_figure(figure, folder / f"{name}.png")
        label = html.escape(figure.get_suptitle() or figure.axes[0].get_title())
        svg = inline_svg(name, figure, label)
        inches = figure.get_figwidth()
        wide = f' style="--inches: {inches:g}"' if inches > 6 else ""
        pictures.append(f"<figure{wide}>{svg}<figcaption><small>{CAPTIONS[name]}</small></figcaption></figure>")
    write_text(made.folder / "report.html", comparison_page(made, pictures))


def comparison_page(made: Outcome, pictures: list[str]) -> str:
    """`report.html`."""
    recipe = made.plan.recipe
    names = f"{len(made.plan.entries)} methods on {model_name(recipe.model)}"
    facts = "\n".join(f"{key} {value}" for key, value in {"inlay": __version__, **machine_name()}.items())
    return html_document(
        f"{names}: which one?",
        f"""<p>{html.escape(verdict(made))}</p>
{standings_table(made)}
<div class="plots">{"".join(pictures)}</div>
{answers_table(made)}
<h2>How it was done</h2>{"".join(f"<p>{html.escape(line)}</p>" for line in reading_guide(made))}
<h2>Recipe</h2><p>Repeat it with <code>inlay compare recipe.yaml</code>, recipe.yaml being</p>
<pre>{html.escape(made.plan.to_yaml())}</pre>
<h2>Environment</h2><pre>{html.escape(facts)}</pre>
<script>{SORT}</script>""",
        STYLE,
    )


def answers_table(made: Outcome) -> str:
    """Some held-out prompts, and what each method answered after the run with its first seed."""
    told = made.kept("samples")
    every = next(iter(told.values()), [])
    parts = []
    for place, row in enumerate(every):
        said = [("reference", row["reference"]), ("before", row["before"])]
        said += [(r.method, told[r.method][place]["after"]) for r in made.standings() if r.method in told]
        body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in said)
        parts.append(f"<h3>{html.escape(row['prompt'])}</h3><table>{body}</table>")
    return f"<h2>Held-out prompts, before and after</h2>{''.join(parts)}" if parts else ""


def verdict(made: Outcome) -> str:
    """The result in a few sentences."""
    reference, rows = made.plan.reference, made.standings()
    others = [row for row in rows if row.method != reference]
    groups = {
        f"better than {reference} beyond noise": [r.method for r in others if r.difference.high < 0],
        f"no different from {reference} beyond noise": [
            r.method for r in others if r.difference.low <= 0 <= r.difference.high
        ],
        f"worse than {reference} beyond noise": [r.method for r in others if r.difference.low > 0],
        "not judged": [r.method for r in others if math.isnan(r.difference.low)],
    }
    said = "; ".join(f"{what}: {', '.join(names)}" for what, names in groups.items() if names)
    best = rows[0]
    return (
        f"Held-out loss {made.before:.3f} before training. The least after it has {best.method}: "
        f"{mean_of(best.losses):.3f}. " + (f"{said[0].upper()}{said[1:]}." if said else "")
    )


def reading_guide(made: Outcome) -> list[str]:
    """How to read the numbers."""
    ask, recipe = made.plan.ask, made.plan.recipe
    steps = sorted(set(made.steps.values()))
    length = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    kind, limit = ask.limit or ("", 0)
    budget = {
        "": "Each method has the size it was given.",
        "parameters": f"Sizes are the largest that train at most {limit:,.0f} numbers.",
        "memory": f"Sizes are the largest whose step peaks at {limit:g} GiB or less (`inlay plan`).",
        "time": f"Steps are cut to {limit:g} seconds of training.",
    }[kind]
    return [
        f"{length} steps of {recipe.batch_size} × {recipe.accumulation} examples. {budget}",
        f"Each method's own learning rate: successive halving (one in {ask.halving} goes on) with seed {ask.seeds[0]}, "
        f"judged by {ask.selection} examples that neither train nor count in the end. A verdict says so where the rate "
        "is the lowest or the highest tried: a better one may lie beyond.",
        f"At that rate, seeds {', '.join(map(str, ask.seeds))}. Intervals: Student's t on the differences of runs with "
        f"the same seed, {CONFIDENCE:.0%}, each by itself: of twenty methods that do not differ, one will seem "
        "to. Losses are means over the answer tokens of the held-out examples.",
        "Forgetting: the loss over unrelated text after training minus before.",
    ] + ([f"{made.metric}: {ask.metric}, after training. {QUESTIONS}"] if made.metric else [])


def standings_table(made: Outcome) -> str:
    """A row per method, the least loss first."""
    apart = f"− {made.plan.reference}"
    heads = ("method", "verdict", "held-out loss", apart, *([made.metric, apart] if made.metric else []))
    heads += ("forgetting", "rate", "size", "trained")
    heads += ("of the model", *(["of the budget"] if made.plan.ask.budget else []), "time", "peak memory")
    return sortable_table(heads, "".join(f"<tr>{''.join(standing_cells(row, made))}</tr>" for row in made.standings()))


def standing_cells(row: Standing, made: Outcome) -> list[str]:
    """One row; what it is sorted by stands beside what is shown."""
    loss, forgets, verdict = mean_of(row.losses), mean_of(row.forgetting), row.verdict + made.said(row)
    base = next(r["base_parameters"] for results in made.finals.values() for r in results if r)
    score = mean_of(row.scores)
    metric: list[tuple[str, str | float]] = [
        (f"{score:.3f}" + plus_minus(row.scores), score),
        (row.apart.shown(), row.apart.mean),
    ]
    shown: list[tuple[str, str | float]] = [
        (row.method, row.method),
        (verdict, verdict),
        (f"{loss:.3f}" + plus_minus(row.losses), loss),
        (row.difference.shown(), row.difference.mean),
        *(metric if made.metric else []),
        (f"{forgets:+.3f}" + plus_minus(row.forgetting), forgets),
        (f"{row.learning_rate:g}", row.learning_rate),
        (row.size, row.size),
        (f"{row.parameters:,.0f}", row.parameters),
        (f"{row.parameters / base:.2%}", row.parameters),
        *([(f"{row.budget_share:.1%}", row.budget_share)] if made.plan.ask.budget else []),
        (f"{row.seconds:.0f} s", row.seconds),
        ("" if math.isnan(row.memory) else gib(row.memory), row.memory),
    ]
    return [html_cell(text, value) for text, value in shown]


def plus_minus(values: list[float]) -> str:
    """The standard deviation, where there is one."""
    return "" if math.isnan(spread_of(values)) else f" ± {spread_of(values):.3f}"
