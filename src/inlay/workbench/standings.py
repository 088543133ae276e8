"""What a comparison found: a row per method with its noise, as a table, results.csv, results.json and the report."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from inlay.workbench import budget, judge
from inlay.workbench.comparison import Entry, Plan
from inlay.workbench.files import write_text
from inlay.workbench.judge import Difference
from inlay.workbench.memory import gib
from inlay.workbench.result import environment

Results = Mapping[str, list[dict[str, Any] | None]]  # of the last rung: by method, one for each seed
COLUMNS = """method verdict loss loss_sd difference difference_low difference_high forgetting forgetting_sd
learning_rate size budget_share parameters parameters_last seconds memory steps seeds failed""".split()


@dataclass
class Sweep:
    """One method's halving: the losses of each rung, and the rates still in it, the best first."""

    rates: list[float]
    rungs: list[tuple[int, dict[float, float]]] = field(default_factory=list)

    def add(self, steps: int, losses: dict[float, float], left: list[float]) -> None:
        """A rung that was run."""
        self.rungs.append((steps, losses))
        self.rates = left

    @property
    def edge(self) -> str:
        """Which end of the swept range the chosen rate is, if it is one: a better one may lie beyond."""
        tried = sorted(self.rungs[0][1]) if self.rungs else []
        if len(tried) < 2 or not self.rates or self.rates[0] not in (tried[0], tried[-1]):
            return ""
        return "lowest" if self.rates[0] == tried[0] else "highest"


@dataclass(frozen=True)
class Standing:
    """One method's row: means over its seeds, standard deviations of single runs; NaN for what is not known."""

    method: str
    losses: list[float]
    difference: Difference
    verdict: str
    forgetting: list[float]
    learning_rate: float
    size: str
    budget_share: float
    parameters: float
    parameters_last: float
    seconds: float
    memory: float
    steps: int
    failed: int

    def row(self) -> dict[str, Any]:
        """Flat, by `COLUMNS`."""
        flat = {k: v for k, v in asdict(self).items() if k in COLUMNS}
        low, high = self.difference.low, self.difference.high
        flat |= {"loss": mean(self.losses), "loss_sd": spread(self.losses), "difference": self.difference.mean}
        flat |= {"forgetting": mean(self.forgetting), "forgetting_sd": spread(self.forgetting)}
        flat |= {"difference_low": low, "difference_high": high, "seeds": len(self.losses)}
        return {name: flat[name] for name in COLUMNS}


@dataclass(frozen=True)
class Outcome:
    """A comparison that was run: its plan, each method's steps, sweep and results."""

    plan: Plan
    folder: Path
    steps: dict[str, int]
    sweeps: dict[str, Sweep]
    finals: Results
    shares: Mapping[str, float]  # of the budget, by method, unless it is one of time

    @property
    def before(self) -> float:
        """The held-out loss of the model as it comes."""
        return next(r["before"] for results in self.finals.values() for r in results if r)

    def standings(self) -> list[Standing]:
        """The rows, the least loss first; what did not finish last."""
        rows = [self.standing(entry) for entry in self.plan.entries]
        return sorted(rows, key=lambda row: (math.isnan(mean(row.losses)), mean(row.losses)))

    def standing(self, entry: Entry) -> Standing:
        """One method's row."""
        name, reference = entry.name, self.plan.reference
        results, sweep = self.finals[name], self.sweeps[name]
        done = [r for r in results if r and r["after"] is not None]
        pairs = (losses(results), losses(self.finals[reference])) if results and name != reference else ([], [])
        difference = judge.paired(*pairs)
        verdict = "the reference" if name == reference else difference.verdict(reference)
        if not done:
            verdict = "failed" if sweep.rates else "diverged or failed at every rate"
        elif sweep.edge:
            verdict += f"; its rate is the {sweep.edge} tried"
        average = {key: mean([r[key] for r in done]) for key in ("parameters", "parameters_last", "seconds", "memory")}
        kind, limit = self.plan.ask.limit or ("", math.nan)
        share = average["seconds"] / limit if kind == "time" else self.shares.get(name, math.nan)
        if share > 1 and done and kind != "time":
            verdict += f"; {share:.3g} times the budget"
        return Standing(
            method=name, losses=losses(done), difference=difference, verdict=verdict,
            forgetting=[r["forgetting"] for r in done if r["forgetting"] is not None],
            learning_rate=sweep.rates[0] if sweep.rates else math.nan, size=sized(entry), budget_share=share,
            steps=self.steps[name], failed=len(results) - len(done), **average,
        )  # fmt: skip


def losses(results: Sequence[dict[str, Any] | None]) -> list[float]:
    """The held-out losses after training; infinite for a run that failed or diverged."""
    return [math.inf if r is None or r["after"] is None else r["after"] for r in results]


def mean(values: list[float]) -> float:
    """The mean; NaN of none."""
    return statistics.fmean(values) if values else math.nan


def spread(values: list[float]) -> float:
    """The standard deviation; NaN of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def sized(entry: Entry) -> str:
    """The size of a method, as its hyperparameter."""
    name = budget.size_field(entry.recipe.method)
    if name is None:
        return ""
    settled = entry.recipe.resolved().args if name not in entry.recipe.args else entry.recipe.args
    return f"{name}={settled[name]}" if name in settled else ""


def machine() -> dict[str, str]:
    """Versions and hardware, without which seconds mean nothing."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {**environment(), "system": platform.platform(), "cores": str(os.cpu_count()), "gpu": gpu}


def plain(value: Any) -> Any:
    """As strict JSON has it: no NaN, no infinity."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_data(made: Outcome) -> dict[str, Any]:
    """Everything that was found, for results.json."""
    rows = [{**row.row(), "losses": row.losses} for row in made.standings()]
    sweeps = {
        name: [{"steps": steps, "losses": {f"{rate:g}": loss for rate, loss in by.items()}} for steps, by in s.rungs]
        for name, s in made.sweeps.items()
    }
    about = {"reference": made.plan.reference, "confidence": judge.CONFIDENCE, "before": made.before}
    return plain({**about, "methods": rows, "sweeps": sweeps, "runs": made.finals, "environment": machine()})


def write(made: Outcome, console: Console) -> None:
    """results.csv, results.json, the plots and the report; the table is printed.

    Raises:
        ValueError: not one run has a result.
    """
    if not any(losses(done) and min(losses(done)) < math.inf for done in made.finals.values()):
        raise ValueError(f"no method finished a run; see the log.txt files under {made.folder / 'runs'}")
    from inlay.workbench import compare_report  # matplotlib takes a second

    text = io.StringIO()
    sheet = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    sheet.writeheader()
    sheet.writerows([plain(row.row()) for row in made.standings()])
    write_text(made.folder / "results.csv", text.getvalue())
    write_text(made.folder / "results.json", json.dumps(as_data(made), indent=1) + "\n")
    compare_report.write(made)
    console.print(table(made))
    for row in made.standings():
        console.print(f"{row.method}: {row.verdict}")
    console.print(f"report: {made.folder / 'report.html'}")


def table(made: Outcome) -> Table:
    """A line per method, for the terminal."""
    shown = Table(title=f"held-out loss; {made.before:.3f} before training", title_justify="left")
    for column in ("method", "loss", "± sd", f"− {made.plan.reference}", "rate", "trained", "time", "peak", "forgets"):
        shown.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in made.standings():
        shown.add_row(row.method, *cells(row))
    return shown


def cells(row: Standing) -> list[str]:
    """A row's numbers as text, after its name."""
    d, found = row.difference, row.row()
    if not row.losses:
        return [""] * 8
    interval = "" if math.isnan(d.low) else f" [{d.low:+.3f}, {d.high:+.3f}]"
    return [
        f"{found['loss']:.3f}", "" if math.isnan(found["loss_sd"]) else f"{found['loss_sd']:.3f}",
        "" if math.isnan(d.mean) else f"{d.mean:+.3f}{interval}", f"{row.learning_rate:g}",
        f"{row.parameters:,.0f}", f"{row.seconds:.0f} s", gib(row.memory), f"{found['forgetting']:+.3f}",
    ]  # fmt: skip
