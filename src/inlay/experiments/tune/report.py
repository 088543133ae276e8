"""What a search leaves: results.csv, the table on the terminal, its history and what mattered as PNG and SVG."""

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
from inlay.experiments.tune.study import BEST, TrialResult, completed_trials, search_state, trial_label
from inlay.files.atomic import write_text
from inlay.inspection.figures import COLOURS, INK, LOOK, finish_plot, new_plot, save_figure
from inlay.messages import gib

SHOWN = 10  # trials in the table on the terminal


def write_search(found: TrialResult, console: Console) -> None:
    """results.csv and plots/; the table is printed."""
    names = list(found.plan.ranges)
    text = io.StringIO()
    columns = ["trial", "state", *names, "loss", "heldout", "metric", "forgetting", "steps", "parameters", "seconds",
               "memory", "best"]  # fmt: skip
    sheet = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    sheet.writeheader()
    sheet.writerows(trial_rows(found))
    write_text(found.folder / "results.csv", text.getvalue())
    (found.folder / "plots").mkdir(exist_ok=True)
    with matplotlib.rc_context(LOOK):
        save_figure(history_plot(found), found.folder / "plots" / "history.png")
        if shares := importance_plot(found):
            save_figure(importance(shares), found.folder / "plots" / "importance.png")
    console.print(trial_table(found))
    console.print(f"best: {trial_label(found.best)}; inlay train {found.folder / BEST}")


def trial_rows(found: TrialResult) -> list[dict[str, Any]]:
    """A row per trial that ended, in their order."""
    made = []
    for trial in found.study.get_trials(deepcopy=False):
        if not trial.state.is_finished():
            continue
        name = trial_label(trial)
        run, again = found.results.get(name, {}), found.again.get(name, {})
        made.append({
            "trial": name, "state": trial.state.name.lower(), **trial.params,
            "loss": trial.values[0] if trial.state == search_state("COMPLETE") else "",
            "heldout": again.get("after", ""), "metric": again.get("metric", ""),
            "forgetting": again.get("forgetting", ""),
            **{key: run.get(key, "") for key in ("steps", "parameters", "seconds", "memory")},
            "best": "best" if trial.number == found.best.number else "",
        })  # fmt: skip
    return made


def trial_table(found: TrialResult) -> Table:
    """The best few, the winner first."""
    measure = metric_title(found.plan.rescore.metric) if found.plan.rescore.metric else ""
    judged = sorted((t for t in found.done if trial_label(t) in found.again), key=found.score)
    rest = [t for t in found.done if trial_label(t) not in found.again]
    counts = Counter(trial.state.name for trial in found.study.get_trials(deepcopy=False))
    words = {"COMPLETE": "to their end", "PRUNED": "pruned", "FAIL": "failed"}
    title = ", ".join(f"{counts[name]} trials {said}" for name, said in words.items() if counts[name])
    made = Table(title=title, title_justify="left")
    heads = (*found.plan.ranges, "loss", "held out, again", *([measure] if measure else []), "forgets", "time", "peak")
    for column in ("trial", *heads):
        made.add_column(column, justify="left" if column == "trial" else "right")
    for trial in [*judged, *rest][:SHOWN]:
        run, again = found.results.get(trial_label(trial), {}), found.again.get(trial_label(trial), {})
        values = [trial.params[name] for name in found.plan.ranges]
        made.add_row(
            trial_label(trial), *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values),
            f"{trial.values[0]:.3f}", number_text(again.get("after")),
            *([number_text(again.get("metric"))] if measure else []),
            number_text(again.get("forgetting"), "+.3f"), number_text(run.get("seconds"), ".0f") + " s",
            gib(run["memory"]) if run else "",
        )  # fmt: skip
    return made


def number_text(value: float | None, form: str = ".3f") -> str:
    """A number as text; nothing where there is none."""
    return "" if value is None else f"{value:{form}}"


def history_plot(found: TrialResult) -> Figure:
    """The loss of every trial in their order, the least so far, and how those that were ended early stood."""
    figure, axes = new_plot("History", "trial", "loss on the examples trials are judged by\n(nats per answer token)")
    ended = [(t.number, t.values[0]) for t in completed_trials(found.study) if math.isfinite(t.values[0])]
    pruned = [
        (t.number, t.values[0])
        for t in found.study.get_trials(deepcopy=False, states=(search_state("PRUNED"),))
        if t.values and math.isfinite(t.values[0])
    ]
    best = [(n, min(loss for m, loss in ended if m <= n)) for n, _ in ended]
    axes.plot(*zip(*best, strict=True), color=INK, linewidth=1, alpha=0.6, label="least so far", drawstyle="steps-post")
    axes.plot(*zip(*ended, strict=True), "o", color=COLOURS[0], label="to its end")
    if pruned:
        axes.plot(*zip(*pruned, strict=True), "x", color=COLOURS[3], label="pruned")
    mark = next(loss for n, loss in ended if n == found.best.number)
    axes.plot(found.best.number, mark, "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, label="best")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish_plot(figure, axes)


def importance_plot(found: TrialResult) -> dict[str, float]:
    """How much each field decided which trials are the best tenth (PED-ANOVA: Watanabe et al., arXiv:2304.10255), as
    shares of 1, the most first; none where there is one field alone, or nothing to tell trials by."""
    import optuna

    losses = {trial.values[0] for trial in found.done}
    if len(found.plan.ranges) < 2 or len(losses) < 4:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of trials that diverged, which it leaves out
        return optuna.importance.get_param_importances(found.study)


def importance(shares: dict[str, float]) -> Figure:
    """How much each field mattered."""
    figure, axes = new_plot("What mattered", "importance (PED-ANOVA, shares of 1)", "")
    names = list(reversed(shares))
    axes.barh(names, [shares[name] for name in names], color=COLOURS[0])
    axes.set_xlim(0, 1)
    return figure
