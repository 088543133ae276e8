"""Write the files that a comparison leaves: JSON, CSV and text tables."""

from __future__ import annotations

import csv
import io
import json
import math

from rich.console import Console
from rich.table import Table

from inlay.experiments.compare.outcome import Outcome, Standing, json_value, losses_of, outcome_as_data
from inlay.experiments.compare.tables import best_recipe, paper_latex, paper_markdown, runs_csv
from inlay.files.atomic import write_text
from inlay.inspection.changes import CHANGES, changes_as_data
from inlay.messages import gib

BEST = "best.yaml"


def write_comparison(outcome: Outcome, console: Console) -> None:
    """Write results.csv, runs.csv, results.json, results.md, results.tex, the plots and the report; print the table.

    Raises:
        ValueError: not one run has a result.
    """
    if not any(losses_of(done) and min(losses_of(done)) < math.inf for done in outcome.finals.values()):
        raise ValueError(f"no method finished a run; see the log.txt files under {outcome.folder / 'runs'}")
    from inlay.experiments.compare.report import write_comparison_page  # matplotlib takes a second

    text = io.StringIO()
    sheet = csv.DictWriter(text, outcome.columns, lineterminator="\n")
    sheet.writeheader()
    sheet.writerows([json_value(outcome.picked(row)) for row in outcome.standings()])
    write_text(outcome.folder / "results.csv", text.getvalue())
    write_text(outcome.folder / "results.json", json.dumps(outcome_as_data(outcome), indent=1) + "\n")
    if outcome.changes:
        changes = {name: changes_as_data(weights) for name, weights in outcome.changes.items()}
        write_text(outcome.folder / CHANGES, json.dumps(changes) + "\n")
    tables = {"runs.csv": runs_csv, "results.md": paper_markdown, "results.tex": paper_latex, BEST: best_recipe}
    for name, made in tables.items():
        write_text(outcome.folder / name, made(outcome))
    write_comparison_page(outcome)
    console.print(results_table(outcome))
    for row in outcome.standings():
        console.print(f"{row.method}: {row.verdict}{outcome.metric_verdict(row)}")
    console.print(f"report: {outcome.folder / 'report.html'}")
    console.print(f"lowest loss: inlay train {outcome.folder / BEST}")


def results_table(outcome: Outcome) -> Table:
    """Build the table for the terminal, with a line per method."""
    table = Table(title=f"held-out loss; {outcome.before:.3f} before training", title_justify="left")
    metric = (outcome.metric, "± sd") if outcome.metric else ()
    heads = ("loss", "± sd", f"− {outcome.plan.reference}", *metric, "rate", "trained", "time", "peak", "forgets")
    for column in ("method", *heads):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in outcome.standings():
        table.add_row(row.method, *results_cells(row, bool(metric)))
    return table


def results_cells(row: Standing, scored: bool) -> list[str]:
    """Return a row's figures as text, after its name."""
    flat = row.row()
    if not row.losses:
        return [""] * (8 + 2 * scored)
    parts = [flat[name] for name in ("loss", "loss_sd", *(("metric", "metric_sd") if scored else ()))]
    loss, noise, *more = ["" if math.isnan(part) else f"{part:.3f}" for part in parts]
    return [
        loss, noise, row.difference.shown(), *more, f"{row.learning_rate:g}",
        f"{row.parameters_last:,.0f}", f"{row.seconds:.0f} s", gib(row.memory),
        "" if math.isnan(flat["forgetting"]) else f"{flat['forgetting']:+.3f}",
    ]  # fmt: skip
