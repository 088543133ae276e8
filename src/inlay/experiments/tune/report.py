"""Write what a search leaves: results.csv, the table on the terminal, and plots of its history and of importance."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections import Counter
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from inlay.evaluation.metric import metric_title
from inlay.experiments.tune.study import BEST, SearchOutcome, completed_trials, search_state, trial_label
from inlay.files.atomic import write_text
from inlay.inspection.figures import COLOURS, INK, LOOK, finish_plot, new_plot, save_figure
from inlay.messages import gib

SHOWN = 10  # trials in the table on the terminal


def write_search(outcome: SearchOutcome, console: Console) -> None:
    """Write results.csv and plots/, and print the table."""
    names = list(outcome.plan.ranges)
    text = io.StringIO()
    columns = ["trial", "state", *names, "loss", "heldout", "metric", "forgetting", "steps", "parameters", "seconds",
               "memory", "best"]  # fmt: skip
    sheet = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    sheet.writeheader()
    sheet.writerows(trial_rows(outcome))
    write_text(outcome.folder / "results.csv", text.getvalue())
    (outcome.folder / "plots").mkdir(exist_ok=True)
    with matplotlib.rc_context(LOOK):
        save_figure(history_plot(outcome), outcome.folder / "plots" / "history.png")
        if shares := importance_plot(outcome):
            save_figure(importance(shares), outcome.folder / "plots" / "importance.png")
    console.print(trial_table(outcome))
    console.print(f"best: {trial_label(outcome.best)}; inlay train {outcome.folder / BEST}")


def trial_rows(outcome: SearchOutcome) -> list[dict[str, Any]]:
    """Return a row per trial that ended, in order."""
    rows = []
    for trial in outcome.study.get_trials(deepcopy=False):
        if not trial.state.is_finished():
            continue
        name = trial_label(trial)
        run, again = outcome.results.get(name, {}), outcome.again.get(name, {})
        rows.append({
            "trial": name, "state": trial.state.name.lower(), **trial.params,
            "loss": trial.values[0] if trial.state == search_state("COMPLETE") else "",
            "heldout": again.get("after", ""), "metric": again.get("metric", ""),
            "forgetting": again.get("forgetting", ""),
            **{key: run.get(key, "") for key in ("steps", "parameters", "seconds", "memory")},
            "best": "best" if trial.number == outcome.best.number else "",
        })  # fmt: skip
    return rows


def trial_table(outcome: SearchOutcome) -> Table:
    """Build the table of the best few trials, the winner first."""
    measure = metric_title(outcome.plan.rescore.metric) if outcome.plan.rescore.metric else ""
    rescored = sorted((t for t in outcome.done if trial_label(t) in outcome.again), key=outcome.score)
    rest = [t for t in outcome.done if trial_label(t) not in outcome.again]
    counts = Counter(trial.state.name for trial in outcome.study.get_trials(deepcopy=False))
    words = {"COMPLETE": "completed", "PRUNED": "pruned", "FAIL": "failed"}
    title = ", ".join(f"{counts[name]} trials {state}" for name, state in words.items() if counts[name])
    table = Table(title=title, title_justify="left")
    heads = (
        *outcome.plan.ranges,
        "loss",
        "held out, again",
        *([measure] if measure else []),
        "forgets",
        "time",
        "peak",
    )
    for column in ("trial", *heads):
        table.add_column(column, justify="left" if column == "trial" else "right")
    for trial in [*rescored, *rest][:SHOWN]:
        run, again = outcome.results.get(trial_label(trial), {}), outcome.again.get(trial_label(trial), {})
        values = [trial.params[name] for name in outcome.plan.ranges]
        table.add_row(
            trial_label(trial), *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values),
            f"{trial.values[0]:.3f}", number_text(again.get("after")),
            *([number_text(again.get("metric"))] if measure else []),
            number_text(again.get("forgetting"), "+.3f"), number_text(run.get("seconds"), ".0f") + " s",
            gib(run["memory"]) if run else "",
        )  # fmt: skip
    return table


def number_text(value: float | None, form: str = ".3f") -> str:
    """Format a number; return an empty text for None."""
    return "" if value is None else f"{value:{form}}"


def history_plot(outcome: SearchOutcome) -> Figure:
    """Plot the loss of every trial in order, the lowest so far, and the last losses of pruned trials."""
    figure, axes = new_plot("History", "trial", "loss on the selection examples\n(nats per answer token)")
    ended = [(t.number, t.values[0]) for t in completed_trials(outcome.study) if math.isfinite(t.values[0])]
    pruned = [
        (t.number, t.values[0])
        for t in outcome.study.get_trials(deepcopy=False, states=(search_state("PRUNED"),))
        if t.values and math.isfinite(t.values[0])
    ]
    best = [(n, min(loss for m, loss in ended if m <= n)) for n, _ in ended]
    axes.plot(*zip(*best, strict=True), color=INK, linewidth=1, alpha=0.6, label="least so far", drawstyle="steps-post")
    axes.plot(*zip(*ended, strict=True), "o", color=COLOURS[0], label="completed")
    if pruned:
        axes.plot(*zip(*pruned, strict=True), "x", color=COLOURS[3], label="pruned")
    mark = next(loss for n, loss in ended if n == outcome.best.number)
    axes.plot(outcome.best.number, mark, "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, label="best")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish_plot(figure, axes)


def importance_plot(outcome: SearchOutcome) -> dict[str, float]:
    """Return how much each field decides which trials are the best tenth, as shares of 1, the largest first.

    By PED-ANOVA (Watanabe et al., arXiv:2304.10255). Empty for a single field, or where the losses do not differ.
    """
    import optuna

    losses = {trial.values[0] for trial in outcome.done}
    if len(outcome.plan.ranges) < 2 or len(losses) < 4:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about trials that diverged, which it leaves out
        return optuna.importance.get_param_importances(outcome.study)


def importance(shares: dict[str, float]) -> Figure:
    """Plot how much each field mattered."""
    figure, axes = new_plot("What mattered", "importance (PED-ANOVA, shares of 1)", "")
    names = list(reversed(shares))
    axes.barh(names, [shares[name] for name in names], color=COLOURS[0])
    axes.set_xlim(0, 1)
    return figure
