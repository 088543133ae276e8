"""Build the page of a comparison: one file that needs no network, with inline plots and a sortable table."""

from __future__ import annotations

import html
import math

from inlay._version import __version__
from inlay.evaluation.paired import CONFIDENCE
from inlay.experiments.compare.outcome import Outcome, Standing, machine_name, mean_of, spread_of
from inlay.experiments.compare.plots import comparison_figures
from inlay.files.atomic import write_text
from inlay.inspection.figures import inline_svg, plot_name, save_figure
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
    "differences": "One that crosses the line cannot tell the two apart; the signs of all others hold together.",
    "curves": "Training loss, smoothed, averaged over seeds.",
    "parameters": "Bars: standard deviation over seeds. Ringed: no other method is better in both.",
    "memory": "Memory of the whole process, libraries included.",
    "seconds": "Wall time of training on the machine below.",
    "forgetting": "Right is more learned, down is less forgotten.",
    "rate_forgetting": "The first rung, one seed: a line from each method's lowest rate to its highest. At equal loss "
    "the lower line forgot less.",
    "rates": "The first rung, one seed, with the rates that were tried beyond the grid.",
    "subspaces": "Medians over the weights, and quartiles; the run with the first seed.",
    "maps": "‖ΔW‖ / ‖W‖ in the run with the first seed. All maps share one logarithmic colour scale.",
    "stack": "Predicted as by <code>inlay plan</code>; only the measured peak of a process includes libraries.",
    "ranks": "Methods whose ranks differ between weights.",
    "spectra": "The middle layer in the run with the first seed. Coloured where the change lies.",
}
QUESTIONS = "Intervals are over seeds, all with the same questions: they do not cover another draw of questions."


def write_comparison_page(outcome: Outcome) -> None:
    """Write report.html, and every plot as PNG and SVG into plots/."""
    folder = outcome.folder / "plots"
    folder.mkdir(exist_ok=True)
    pictures = []
    for name, figure in comparison_figures(outcome):
        label = html.escape(plot_name(figure))
        svg = inline_svg(name, save_figure(figure, folder / f"{name}.png"), label)
        inches = figure.get_figwidth()
        wide = f' style="--inches: {inches:g}"' if inches > 6 else ""
        pictures.append(f"<figure{wide}>{svg}<figcaption><small>{CAPTIONS[name]}</small></figcaption></figure>")
    write_text(outcome.folder / "report.html", comparison_page(outcome, pictures))


def comparison_page(outcome: Outcome, pictures: list[str]) -> str:
    """Return the content of report.html."""
    recipe = outcome.plan.recipe
    names = f"{len(outcome.plan.entries)} methods on {model_name(recipe.model)}"
    facts = "\n".join(f"{key} {value}" for key, value in {"inlay": __version__, **machine_name()}.items())
    return html_document(
        f"{names}: which one?",
        f"""<p>{html.escape(verdict(outcome))}</p>
{standings_table(outcome)}
<div class="plots">{"".join(pictures)}</div>
{answers_table(outcome)}
<h2>How the methods were compared</h2>{"".join(f"<p>{html.escape(line)}</p>" for line in reading_guide(outcome))}
<h2>Recipe</h2><p>Repeat the comparison with <code>inlay compare recipe.yaml</code>, where recipe.yaml is</p>
<pre>{html.escape(outcome.plan.to_yaml())}</pre>
<h2>Environment</h2><pre>{html.escape(facts)}</pre>
<script>{SORT}</script>""",
        STYLE,
    )


def answers_table(outcome: Outcome) -> str:
    """Return some held-out prompts with each method's answers after the run with its first seed."""
    samples = outcome.kept("samples")
    prompts = next(iter(samples.values()), [])
    parts = []
    for place, row in enumerate(prompts):
        answers = [("reference", row["reference"]), ("before", row["before"])]
        answers += [(r.method, samples[r.method][place]["after"]) for r in outcome.standings() if r.method in samples]
        body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in answers)
        parts.append(f"<h3>{html.escape(row['prompt'])}</h3><table>{body}</table>")
    return f"<h2>Held-out prompts, before and after</h2>{''.join(parts)}" if parts else ""


def verdict(outcome: Outcome) -> str:
    """Summarise the result in a few sentences."""
    reference, rows = outcome.plan.reference, outcome.standings()
    headings = {
        "better": f"better than {reference}",
        "equivalent": f"equivalent to {reference}",
        "cannot tell": f"these runs cannot tell from {reference}",
        "worse": f"worse than {reference}",
        "not tuned": "no verdict, as a learning rate is not tuned",
        "no comparison": "not compared",
    }
    groups = {headings[word]: [r.method for r in rows if r.word == word] for word in headings}
    summary = "; ".join(f"{what}: {', '.join(names)}" for what, names in groups.items() if names)
    ranked = [row for row in rows if row.word in ("better", "equivalent", "cannot tell", "worse")]
    best = min([r for r in rows if r.method == reference or r in ranked], key=lambda r: mean_of(r.losses))
    lowest = f" The lowest after training: {best.method}, {mean_of(best.losses):.3f}." if ranked else ""
    return f"Held-out loss {outcome.before:.3f} before training.{lowest}" + (
        f" {summary[0].upper()}{summary[1:]}." if summary else ""
    )


def reading_guide(outcome: Outcome) -> list[str]:
    """Explain how to read the figures."""
    spec, recipe = outcome.plan.spec, outcome.plan.recipe
    steps = sorted(set(outcome.steps.values()))
    length = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    kind, limit = spec.limit or ("", 0)
    budget = {
        "": "Each method has the size that the recipe sets.",
        "parameters": f"Sizes are the largest that train at most {limit:,.0f} parameters at the end of training.",
        "memory": f"Sizes are the largest whose step peaks at {limit:g} GiB or less (`inlay plan`).",
        "time": f"Steps are limited to {limit:g} seconds of training.",
    }[kind]
    return [
        f"{length} steps of {recipe.batch_size} × {recipe.accumulation} examples. {budget}",
        f"Each method's own learning rate: successive halving (one rate in {spec.halving} continues) with seed "
        f"{spec.seeds[0]}, evaluated on {spec.selection} examples used neither in training nor in the final losses. No "
        "rate is dropped on a difference within noise (twice its standard error over those examples; where that is not "
        f"known, {spec.margin:g}), and while the best is at an end of the grid up to {spec.extend} more "
        "are tried beyond it. A method whose best rate is still at an end, or that had one rate only, is not ranked.",
        f"At that rate, seeds {', '.join(map(str, spec.seeds))}. Intervals: Student's t on the differences of runs "
        "with the same seed, corrected for the number of methods (Holm), so that with "
        f"{CONFIDENCE:.0%} every better and worse is right. Equivalent: all of the interval lies within "
        f"{spec.margin:g}. Cannot tell: it includes 0 and more; the difference beside it is what so many seeds, as "
        "noisy as these, show four times in five. Losses "
        f"are in {outcome.unit}, means over the held-out examples.",
        *(["Forgetting: the loss over unrelated text after training minus before."] if outcome.forgets else []),
    ] + (
        [f"{outcome.metric}: {spec.metric or 'of the held-out examples'}, after training. {QUESTIONS}"]
        if outcome.metric
        else []
    )


def standings_table(outcome: Outcome) -> str:
    """Return a table with a row per method, the lowest loss first."""
    difference = f"− {outcome.plan.reference}"
    heads = (
        "method",
        "verdict",
        "held-out loss",
        difference,
        *([outcome.metric, difference] if outcome.metric else []),
    )
    heads += (*(["forgetting"] if outcome.forgets else []), "rate", "size", "trained")
    heads += ("of the model", *(["of the budget"] if outcome.plan.spec.budget else []), "time", "peak memory")
    return sortable_table(
        heads, "".join(f"<tr>{''.join(standing_cells(row, outcome))}</tr>" for row in outcome.standings())
    )


def standing_cells(row: Standing, outcome: Outcome) -> list[str]:
    """Return the cells of one row, each with the value that it is sorted by."""
    loss = mean_of(row.losses)
    forgets = mean_of(row.forgetting)
    verdict = row.verdict + outcome.metric_verdict(row)
    base = next(r["base_parameters"] for results in outcome.finals.values() for r in results if r)
    score = mean_of(row.scores)
    metric: list[tuple[str, str | float]] = [
        (f"{score:.3f}" + plus_minus(row.scores), score),
        (row.score_difference.shown(), row.score_difference.mean),
    ]
    shown: list[tuple[str, str | float]] = [
        (row.method, row.method),
        (verdict, verdict),
        (f"{loss:.3f}" + plus_minus(row.losses), loss),
        (row.difference.shown(), row.difference.mean),
        *(metric if outcome.metric else []),
        *([(f"{forgets:+.3f}" + plus_minus(row.forgetting), forgets)] if outcome.forgets else []),
        (f"{row.learning_rate:g}", row.learning_rate),
        (row.size, row.size),
        (shown_parameters(row), row.parameters_last),
        (f"{row.parameters_last / base:.2%}", row.parameters_last),
        *([(f"{row.budget_share:.1%}", row.budget_share)] if outcome.plan.spec.budget else []),
        (f"{row.seconds:.0f} s", row.seconds),
        ("" if math.isnan(row.memory) else gib(row.memory), row.memory),
    ]
    return [html_cell(text, value) for text, value in shown]


def shown_parameters(row: Standing) -> str:
    """Return how many parameters are trained: at first and in the end, where these differ."""
    first, last = f"{row.parameters:,.0f}", f"{row.parameters_last:,.0f}"
    return last if first == last or math.isnan(row.parameters) else f"{first} → {last}"


def plus_minus(values: list[float]) -> str:
    """Return the standard deviation as text; empty where there is none."""
    return "" if math.isnan(spread_of(values)) else f" ± {spread_of(values):.3f}"
