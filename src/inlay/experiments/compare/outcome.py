"""Evaluate the runs of a comparison: a row per method with its noise, and the data of results.json."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from inlay.evaluation.metric import metric_title
from inlay.evaluation.paired import CONFIDENCE, Difference, holm, paired
from inlay.experiments.compare.budget import method_size_field
from inlay.experiments.compare.spec import ComparisonPlan, Entry
from inlay.experiments.compare.sweep import Sweep
from inlay.inspection.changes import WeightChange, changes_from_data
from inlay.models.model_classes import find_model_class
from inlay.reports.result import environment

Results = Mapping[str, list[dict[str, Any] | None]]  # of the last rung: by method, one per seed
COLUMNS = """method verdict loss loss_sd difference difference_low difference_high detectable forgetting forgetting_sd
learning_rate size budget_share parameters parameters_last seconds memory steps seeds failed""".split()
DETAILS = ("changes", "memory_planned", "samples")  # kept of one run of each method
SCORED = "metric metric_sd metric_difference metric_difference_low metric_difference_high".split()  # only with a metric


WORDS = ("better", "equivalent", "cannot tell", "worse", "not tuned", "no comparison")


@dataclass(frozen=True)
class Standing:
    """Hold one method's row: means over its seeds, standard deviations of single runs, NaN where unknown.

    The signs of all rows' differences hold together (`holm`). `word` is the verdict in one of `WORDS`.
    """

    method: str
    losses: list[float]
    difference: Difference
    verdict: str
    word: str
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
    scores: list[float]  # by the metric, if there is one
    score_difference: Difference  # of the scores, to those of the reference

    def row(self) -> dict[str, Any]:
        """Return the row as flat data by `COLUMNS` and `SCORED`."""
        flat = {k: v for k, v in asdict(self).items() if k in COLUMNS}
        low, high = self.difference.low, self.difference.high
        flat |= {"loss": mean_of(self.losses), "loss_sd": spread_of(self.losses), "difference": self.difference.mean}
        flat |= {"forgetting": mean_of(self.forgetting), "forgetting_sd": spread_of(self.forgetting)}
        flat |= {"difference_low": low, "difference_high": high, "seeds": len(self.losses)}
        flat |= {"detectable": self.difference.detectable}
        flat |= {
            "metric": mean_of(self.scores),
            "metric_sd": spread_of(self.scores),
            "metric_difference": self.score_difference.mean,
        }
        flat |= {
            "metric_difference_low": self.score_difference.low,
            "metric_difference_high": self.score_difference.high,
        }
        return {name: flat[name] for name in COLUMNS + SCORED}


@dataclass(frozen=True)
class Outcome:
    """Hold a comparison that was run: its plan, and each method's steps, sweep and results."""

    plan: ComparisonPlan
    folder: Path
    steps: dict[str, int]
    sweeps: dict[str, Sweep]
    finals: Results
    shares: Mapping[str, float]  # of the budget, by method, unless the budget is time

    @property
    def before(self) -> float:
        """Return the held-out loss before training."""
        return next(r["before"] for results in self.finals.values() for r in results if r)

    @property
    def metric(self) -> str:
        """Return the title of the metric beside the loss; empty where there is none."""
        found = (r["metric_name"] for results in self.finals.values() for r in results if r and "metric_name" in r)
        return metric_title(self.plan.spec.metric) if self.plan.spec.metric else next(found, "")

    @property
    def unit(self) -> str:
        """Return what a loss of the task is measured in: nats per answer token."""
        return find_model_class(self.plan.recipe.task).loss.partition("(")[2].rstrip(")")

    @property
    def forgets(self) -> bool:
        """Return whether what was forgotten of plain text was measured, as of causal language models."""
        return any(r and r["forgetting"] is not None for results in self.finals.values() for r in results)

    def kept(self, what: str) -> dict[str, Any]:
        """Return one of DETAILS by method, from the runs with the first seed that have it."""
        firsts = {name: (results or [None])[0] or {} for name, results in self.finals.items()}
        return {name: r[what] for name, r in firsts.items() if r.get(what)}

    @cached_property
    def changes(self) -> dict[str, dict[str, WeightChange]]:
        """Return where the weights changed in the run with the first seed, by method and module."""
        return {name: changes_from_data(data) for name, data in self.kept("changes").items()}

    @property
    def columns(self) -> list[str]:
        """Return the columns of results.csv."""
        return [*COLUMNS, *SCORED] if self.metric else [*COLUMNS]

    def picked(self, row: Standing) -> dict[str, Any]:
        """Return a row by the columns of results.csv."""
        flat = row.row()
        return {name: flat[name] for name in self.columns}

    def metric_verdict(self, row: Standing) -> str:
        """Return the verdict on the metric, if there is one: whether it is lower or higher, not which is better."""
        if not self.metric or row.method == self.plan.reference or row.word in ("not tuned", "no comparison"):
            return ""
        words = row.score_difference.verdict(self.plan.reference, below="lower", above="higher")
        return f"; {self.metric}: {words}"

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """Return each method's difference to the reference in the loss, with the interval it is judged by."""
        return self._corrected(losses_of)

    @cached_property
    def score_differences(self) -> dict[str, Difference]:
        """Return the same of the metric."""
        return self._corrected(scores_of)

    def _corrected(self, values: Callable[[Sequence[dict[str, Any] | None]], list[float]]) -> dict[str, Difference]:
        reference = self.plan.reference
        others = {name: results for name, results in self.finals.items() if name != reference}
        found = {name: paired(values(r), values(self.finals[reference] if r else [])) for name, r in others.items()}
        return {reference: paired([], []), **holm(found)}

    def standings(self) -> list[Standing]:
        """Return the rows, the lowest loss first and methods that did not finish last."""
        rows = [self.standing(entry) for entry in self.plan.entries]
        return sorted(rows, key=lambda row: (math.isnan(mean_of(row.losses)), mean_of(row.losses)))

    def standing(self, entry: Entry) -> Standing:
        """Return one method's row."""
        name, results = entry.name, self.finals[entry.name]
        sweep = self.sweeps[name]
        done = [r for r in results if r and r["after"] is not None]
        average = {
            key: mean_of([r[key] for r in done]) for key in ("parameters", "parameters_last", "seconds", "memory")
        }
        kind, limit = self.plan.spec.limit or ("", math.nan)
        share = average["seconds"] / limit if kind == "time" else self.shares.get(name, math.nan)
        word, verdict = self.judged(name, bool(done))
        if done and sweep.failed:
            verdict += f"; failed at rate {', '.join(f'{rate:g}' for rate in sorted(set(sweep.failed)))}"
        if share > 1 and done and kind != "time":
            verdict += f"; {share:.3g} times the budget"
        return Standing(
            method=name, losses=losses_of(done), difference=self.differences[name], verdict=verdict, word=word,
            forgetting=[r["forgetting"] for r in done if r["forgetting"] is not None],
            learning_rate=sweep.rates[0] if sweep.rates else math.nan, size=with_size(entry), budget_share=share,
            steps=self.steps[name], failed=len(results) - len(done), **average,
            scores=[score for score in scores_of(results) if not math.isnan(score)],
            score_difference=self.score_differences[name],
        )  # fmt: skip

    def judged(self, name: str, finished: bool) -> tuple[str, str]:
        """Return the verdict on a method as one of `WORDS` ("" for the reference) and in a sentence."""
        reference, sweep = self.plan.reference, self.sweeps[name]
        if not finished:
            return "no comparison", "failed" if sweep.rates else "diverged or failed at every rate"
        if name == reference:
            return "", "the reference" + (f"; not tuned: {sweep.untuned}" if sweep.untuned else "")
        if sweep.untuned:
            return "not tuned", f"not tuned: {sweep.untuned}"
        if self.sweeps[reference].untuned:
            return "not tuned", f"no verdict: {reference} is not tuned"
        text = self.differences[name].verdict(reference, self.plan.spec.margin)
        return next(word for word in WORDS if text.startswith(word)), text


def losses_of(results: Sequence[dict[str, Any] | None]) -> list[float]:
    """Return the held-out losses after training; infinite for a run that failed or diverged."""
    return [math.inf if r is None or r["after"] is None else r["after"] for r in results]


def scores_of(results: Sequence[dict[str, Any] | None]) -> list[float]:
    """Return the metric of each run; NaN for one that failed or diverged."""
    return [math.nan if r is None else r.get("metric", math.nan) for r in results]


def mean_of(values: list[float]) -> float:
    """Return the mean of `values`; NaN of none."""
    return statistics.fmean(values) if values else math.nan


def spread_of(values: list[float]) -> float:
    """Return the standard deviation of `values`; NaN of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def spread_text(values: list[float]) -> str:
    """Return the mean of `values` as text, with their standard deviation where there is one; empty of none."""
    noise = spread_of(values)
    if not values:
        return ""
    return f"{mean_of(values):.3f}" + ("" if math.isnan(noise) else f" ± {noise:.3f}")


def with_size(entry: Entry) -> str:
    """Return the size of a method as its hyperparameter, such as "r=8"; empty where it has none."""
    name = method_size_field(entry.recipe.method)
    if name is None:
        return ""
    settled = entry.recipe.resolved().args if name not in entry.recipe.args else entry.recipe.args
    return f"{name}={settled[name]}" if name in settled else ""


def machine_name() -> dict[str, str]:
    """Return versions and hardware, without which seconds mean nothing."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {**environment(), "system": platform.platform(), "cores": str(os.cpu_count()), "gpu": gpu}


def json_value(value: Any) -> Any:
    """Return a value as strict JSON has it, without NaN and infinity."""
    if isinstance(value, dict):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def outcome_as_data(outcome: Outcome) -> dict[str, Any]:
    """Return the content of results.json: everything but what changes.json and the page hold."""
    rows = [{**outcome.picked(row), "losses": row.losses} for row in outcome.standings()]
    sweeps = {
        name: [{"steps": steps, "losses": {f"{rate:g}": loss for rate, loss in by.items()}} for steps, by in s.rungs]
        for name, s in outcome.sweeps.items()
    }
    forgotten = {name: {f"{r:g}": rise for r, rise in s.forgotten.items()} for name, s in outcome.sweeps.items()}
    about = {"reference": outcome.plan.reference, "confidence": CONFIDENCE, "before": outcome.before}
    runs = {
        name: [r and {key: value for key, value in r.items() if key not in DETAILS} for r in results]
        for name, results in outcome.finals.items()
    }
    about |= {"methods": rows, "sweeps": sweeps, "sweep_forgetting": forgotten}
    return json_value({**about, "runs": runs, "environment": machine_name()})
