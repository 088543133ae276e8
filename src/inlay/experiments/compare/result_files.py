"""The files that a comparison leaves: JSON, CSV and text tables."""

from __future__ import annotations

import csv
import io
import json
import math

from rich.console import Console
from rich.table import Table

from inlay.experiments.compare.outcome import Outcome, Standing, json_value, losses_of, outcome_as_data
from inlay.files.atomic import write_text
from inlay.inspection.changes import CHANGES, changes_as_data
from inlay.messages import gib


def write_comparison(made: Outcome, console: Console) -> None:
    """results.csv, results.json, the plots and the report; the table is printed.

    Raises:
        ValueError: not one run has a result.
    """
    if not any(losses_of(done) and min(losses_of(done)) < math.inf for done in made.finals.values()):
        raise ValueError(f"no method finished a run; see the log.txt files under {made.folder / 'runs'}")
    from inlay.experiments.compare.report import write_comparison_page  # matplotlib takes a second

    text = io.StringIO()
    sheet = csv.DictWriter(text, made.columns, lineterminator="\n")
    sheet.writeheader()
    sheet.writerows([json_value(made.picked(row)) for row in made.standings()])
    write_text(made.folder / "results.csv", text.getvalue())
    write_text(made.folder / "results.json", json.dumps(outcome_as_data(made), indent=1) + "\n")
    if found := made.changes:
        write_text(made.folder / CHANGES, json.dumps({name: changes_as_data(of) for name, of in found.items()}) + "\n")
    write_comparison_page(made)
    console.print(results_table(made))
    for row in made.standings():
        console.print(f"{row.method}: {row.verdict}{made.said(row)}")
    console.print(f"report: {made.folder / 'report.html'}")


def results_table(made: Outcome) -> Table:
    """A line per method, for the terminal."""
    shown = Table(title=f"held-out loss; {made.before:.3f} before training", title_justify="left")
    found = (made.metric, "± sd") if made.metric else ()
    heads = ("loss", "± sd", f"− {made.plan.reference}", *found, "rate", "trained", "time", "peak", "forgets")
    for column in ("method", *heads):
        shown.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in made.standings():
        shown.add_row(row.method, *results_cells(row, bool(found)))
    return shown


def results_cells(row: Standing, scored: bool) -> list[str]:
    """A row's numbers as text, after its name."""
    found = row.row()
    if not row.losses:
        return [""] * (8 + 2 * scored)
    parts = [found[name] for name in ("loss", "loss_sd", *(("metric", "metric_sd") if scored else ()))]
    loss, noise, *more = ["" if math.isnan(part) else f"{part:.3f}" for part in parts]
    return [
        loss, noise, row.difference.shown(), *more, f"{row.learning_rate:g}",
        f"{row.parameters:,.0f}", f"{row.seconds:.0f} s", gib(row.memory), f"{found['forgetting']:+.3f}",
    ]  # fmt: skip
