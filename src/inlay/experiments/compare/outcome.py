"""What a comparison found: a row per method with its noise, as a table, results.csv, results.json and the report."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from inlay.evaluation.metric import metric_title
from inlay.evaluation.paired import CONFIDENCE, Difference, paired
from inlay.experiments.compare.budget import method_size_field
from inlay.experiments.compare.spec import ComparisonPlan, Entry
from inlay.inspection.changes import WeightChange, changes_from_data
from inlay.reports.result import environment

Results = Mapping[str, list[dict[str, Any] | None]]  # of the last rung: by method, one for each seed
COLUMNS = """method verdict loss loss_sd difference difference_low difference_high forgetting forgetting_sd
learning_rate size budget_share parameters parameters_last seconds memory steps seeds failed""".split()
LOOKED = ("changes", "memory_planned", "samples")  # kept of one run of each method
SCORED = "metric metric_sd metric_difference metric_difference_low metric_difference_high".split()  # with a metric


@dataclass
class Sweep:
    """One method's halving: the losses of each rung, the rates still in it, the best first, and those whose run failed,
    which says nothing of the rate."""

    rates: list[float]
    rungs: list[tuple[int, dict[float, float]]] = field(default_factory=list)
    failed: list[float] = field(default_factory=list)

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
    scores: list[float]  # by the metric, if one is asked for
    apart: Difference  # of the scores, to those of the reference

    def row(self) -> dict[str, Any]:
        """Flat, by `COLUMNS` and `SCORED`."""
        flat = {k: v for k, v in asdict(self).items() if k in COLUMNS}
        low, high = self.difference.low, self.difference.high
        flat |= {"loss": mean_of(self.losses), "loss_sd": spread_of(self.losses), "difference": self.difference.mean}
        flat |= {"forgetting": mean_of(self.forgetting), "forgetting_sd": spread_of(self.forgetting)}
        flat |= {"difference_low": low, "difference_high": high, "seeds": len(self.losses)}
        flat |= {
            "metric": mean_of(self.scores),
            "metric_sd": spread_of(self.scores),
            "metric_difference": self.apart.mean,
        }
        flat |= {"metric_difference_low": self.apart.low, "metric_difference_high": self.apart.high}
        return {name: flat[name] for name in COLUMNS + SCORED}


@dataclass(frozen=True)
class Outcome:
    """A comparison that was run: its plan, each method's steps, sweep and results."""

    plan: ComparisonPlan
    folder: Path
    steps: dict[str, int]
    sweeps: dict[str, Sweep]
    finals: Results
    shares: Mapping[str, float]  # of the budget, by method, unless it is one of time

    @property
    def before(self) -> float:
        """The held-out loss of the model as it comes."""
        return next(r["before"] for results in self.finals.values() for r in results if r)

    @property
    def metric(self) -> str:
        """What runs are judged by beside the loss; empty where there is nothing."""
        return metric_title(self.plan.ask.metric) if self.plan.ask.metric else ""

    def kept(self, what: str) -> dict[str, Any]:
        """By method, something of LOOKED that its run with the first seed left; only those that have it."""
        firsts = {name: (results or [None])[0] or {} for name, results in self.finals.items()}
        return {name: r[what] for name, r in firsts.items() if r.get(what)}

    @cached_property
    def changes(self) -> dict[str, dict[str, WeightChange]]:
        """By method and module, where the weights changed in the run with the first seed, where that is known."""
        return {name: changes_from_data(told) for name, told in self.kept("changes").items()}

    @property
    def columns(self) -> list[str]:
        """Of results.csv."""
        return [*COLUMNS, *SCORED] if self.metric else [*COLUMNS]

    def picked(self, row: Standing) -> dict[str, Any]:
        """A row by these columns."""
        found = row.row()
        return {name: found[name] for name in self.columns}

    def said(self, row: Standing) -> str:
        """The verdict on the metric, where there is one: it does not know whether more or less of it is better."""
        if not self.metric or row.method == self.plan.reference or not row.losses:
            return ""
        return f"; {self.metric}: {row.apart.verdict(self.plan.reference, 'lower', 'higher')}"

    def standings(self) -> list[Standing]:
        """The rows, the least loss first; what did not finish last."""
        rows = [self.standing(entry) for entry in self.plan.entries]
        return sorted(rows, key=lambda row: (math.isnan(mean_of(row.losses)), mean_of(row.losses)))

    def standing(self, entry: Entry) -> Standing:
        """One method's row."""
        name, reference = entry.name, self.plan.reference
        results, sweep = self.finals[name], self.sweeps[name]
        done = [r for r in results if r and r["after"] is not None]
        others = self.finals[reference] if results and name != reference else []
        difference = paired(losses_of(results), losses_of(others))
        verdict = "the reference" if name == reference else difference.verdict(reference)
        if not done:
            verdict = "failed" if sweep.rates else "diverged or failed at every rate"
        elif sweep.edge:
            verdict += f"; its rate is the {sweep.edge} tried"
        if done and name != reference and (edge := self.sweeps[reference].edge):
            verdict += f"; the rate of {reference} is the {edge} tried"
        if done and sweep.failed:
            verdict += f"; failed at rate {', '.join(f'{rate:g}' for rate in sorted(set(sweep.failed)))}"
        average = {
            key: mean_of([r[key] for r in done]) for key in ("parameters", "parameters_last", "seconds", "memory")
        }
        kind, limit = self.plan.ask.limit or ("", math.nan)
        share = average["seconds"] / limit if kind == "time" else self.shares.get(name, math.nan)
        if share > 1 and done and kind != "time":
            verdict += f"; {share:.3g} times the budget"
        return Standing(
            method=name, losses=losses_of(done), difference=difference, verdict=verdict,
            forgetting=[r["forgetting"] for r in done if r["forgetting"] is not None],
            learning_rate=sweep.rates[0] if sweep.rates else math.nan, size=with_size(entry), budget_share=share,
            steps=self.steps[name], failed=len(results) - len(done), **average,
            scores=[score for score in scores_of(results) if not math.isnan(score)],
            apart=paired(scores_of(results), scores_of(others)),
        )  # fmt: skip


def losses_of(results: Sequence[dict[str, Any] | None]) -> list[float]:
    """The held-out losses after training; infinite for a run that failed or diverged."""
    return [math.inf if r is None or r["after"] is None else r["after"] for r in results]


def scores_of(results: Sequence[dict[str, Any] | None]) -> list[float]:
    """What the metric says of each run; NaN for one that failed or diverged."""
    return [math.nan if r is None else r.get("metric", math.nan) for r in results]


def mean_of(values: list[float]) -> float:
    """The mean; NaN of none."""
    return statistics.fmean(values) if values else math.nan


def spread_of(values: list[float]) -> float:
    """The standard deviation; NaN of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def with_size(entry: Entry) -> str:
    """The size of a method, as its hyperparameter."""
    name = method_size_field(entry.recipe.method)
    if name is None:
        return ""
    settled = entry.recipe.resolved().args if name not in entry.recipe.args else entry.recipe.args
    return f"{name}={settled[name]}" if name in settled else ""


def machine_name() -> dict[str, str]:
    """Versions and hardware, without which seconds mean nothing."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {**environment(), "system": platform.platform(), "cores": str(os.cpu_count()), "gpu": gpu}


def json_value(value: Any) -> Any:
    """As strict JSON has it: no NaN, no infinity."""
    if isinstance(value, dict):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def outcome_as_data(made: Outcome) -> dict[str, Any]:
    """Everything that was found, for results.json, but what stands in changes.json and on the page alone."""
    rows = [{**made.picked(row), "losses": row.losses} for row in made.standings()]
    sweeps = {
        name: [{"steps": steps, "losses": {f"{rate:g}": loss for rate, loss in by.items()}} for steps, by in s.rungs]
        for name, s in made.sweeps.items()
    }
    about = {"reference": made.plan.reference, "confidence": CONFIDENCE, "before": made.before}
    runs = {
        name: [r and {key: value for key, value in r.items() if key not in LOOKED} for r in results]
        for name, results in made.finals.items()
    }
    return json_value({**about, "methods": rows, "sweeps": sweeps, "runs": runs, "environment": machine_name()})
