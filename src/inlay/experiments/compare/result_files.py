"""Write the files that a comparison leaves: JSON, CSV and text tables."""

from __future__ import annotations

import csv
import io
import json
import math

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from inlay.experiments.compare.outcome import (
    Outcome,
    Standing,
    json_value,
    losses_of,
    mean_of,
    outcome_as_data,
    spread_text,
)
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
    console.print(results_table(outcome, console.width))
    for row in outcome.standings():
        console.print(f"{row.method}: {row.verdict}{outcome.metric_verdict(row)}")
    console.print(f"report: {outcome.folder / 'report.html'}")
    console.print(f"lowest loss: inlay train {outcome.folder / BEST}")


def results_table(outcome: Outcome, width: int) -> Table:
    """Build the table for the terminal: a line per method, and the columns that `width` characters have room for."""
    rows = [{"method": row.method, **results_cells(outcome, row)} for row in outcome.standings()]
    heads = list(rows[0])
    widths = {head: max(cell_len(text) for text in (head, *(row[head] for row in rows))) for head in heads}
    shown = [head for n, head in enumerate(heads) if sum(widths[h] + 3 for h in heads[: n + 1]) < width]
    table = Table(title=f"held-out loss; {outcome.before:.3f} before training", title_justify="left")
    if left_out := ", ".join(heads[len(shown) :]):
        table.caption, table.caption_justify = f"results.csv also has: {left_out}", "left"
    for head in shown:
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[head] for head in shown))
    return table


def results_cells(outcome: Outcome, row: Standing) -> dict[str, str]:
    """Return a row's figures as text by their headings, what matters most first; empty if no run finished."""
    forgot = mean_of(row.forgetting)
    cells = {
        "loss": spread_text(row.losses),
        f"− {outcome.plan.reference}": row.difference.shown(),
        **({outcome.metric: spread_text(row.scores)} if outcome.metric else {}),
        "rate": f"{row.learning_rate:g}",
        "trained": f"{row.parameters_last:,.0f}",
        "forgets": "" if math.isnan(forgot) else f"{forgot:+.3f}",
        "time": f"{row.seconds:.0f} s",
        "peak": gib(row.memory),
    }
    return cells if row.losses else dict.fromkeys(cells, "")
