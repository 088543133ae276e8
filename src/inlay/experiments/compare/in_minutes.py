"""Plan a comparison for data and a time: which methods, how many steps and seeds fit."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from rich.console import Console

from inlay.evaluation.paired import CONFIDENCE, Difference
from inlay.experiments.compare.compare import PLAN, PROBE, compare, shared_examples, trial_of
from inlay.experiments.compare.spec import Comparison, ComparisonPlan, load_comparison, plan_comparison
from inlay.experiments.ray_cluster import workers
from inlay.experiments.runner import Runner, steps_of
from inlay.files.untrusted import user_path
from inlay.messages import duration
from inlay.recipe.reading import non_defaults
from inlay.recipe.recipe import Recipe

ORDER = ("lora", "bone", "milora", "pissa", "dota", "lamda", "bat", "peft:dora")  # as many as fit, from the first
RATES = 3
SEEDS, MORE_SEEDS = 3, 5
FEWEST, ENOUGH = 20, 60  # steps of a run
NOISE = 0.01  # standard deviation of the difference of two methods at one seed: docs/results/e2e has .004 to .012


@dataclass(frozen=True)
class TimedPlan:
    """Hold what fits a time: how many methods, the steps of a run, the seeds, and how long all of it takes."""

    methods: int
    steps: int
    seeds: int
    seconds: float

    @property
    def detectable(self) -> float:
        """Return the difference to the reference that is shown four times in five, at the usual noise."""
        error = NOISE / math.sqrt(self.seeds)
        return Difference(0.0, 0.0, 0.0, error, self.seeds).at(1 - (1 - CONFIDENCE) / (self.methods - 1)).detectable


def seconds_of(methods: int, steps: int, seeds: int, step: float, start: float) -> float:
    """Return how long a comparison takes: a first rung with a rate more than the grid has, a second one, the seeds."""
    return methods * ((RATES + 2 + seeds) * start + ((RATES + 1) / 3 + 1 + seeds) * steps * step)


def fit_to_time(seconds: float, step: float, start: float, longest: int) -> TimedPlan:
    """Return the largest comparison that takes at most so many `seconds`: first methods, then steps, then seeds.

    Args:
        seconds: for all of it.
        step: of one optimiser step.
        start: of a run, before and after its steps.
        longest: steps of one pass over the data, more than which no run takes.

    Raises:
        ValueError: two methods do not fit; the message says how long they take.
    """
    for least in (min(ENOUGH, longest), min(FEWEST, longest)):
        for methods in range(len(ORDER), 1, -1):
            if seconds_of(methods, least, SEEDS, step, start) > seconds:
                continue
            each = seconds_of(methods, 1, SEEDS, step, start) - seconds_of(methods, 0, SEEDS, step, start)
            steps = min(longest, int((seconds - seconds_of(methods, 0, SEEDS, step, start)) / each))
            seeds = next(n for n in range(MORE_SEEDS, 0, -1) if n == SEEDS or (
                n > SEEDS and seconds_of(methods, steps, n, step, start) <= seconds))  # fmt: skip
            return TimedPlan(methods, steps, seeds, seconds_of(methods, steps, seeds, step, start))
    needed = math.ceil(seconds_of(2, min(FEWEST, longest), SEEDS, step, start) / 60)
    raise ValueError(
        f"minutes: {seconds / 60:g} is too short: two methods with {SEEDS} seeds and {min(FEWEST, longest)} steps take "
        f"about {needed} minutes; give --minutes {needed}, or a smaller --batch-size or --max-length"
    )


def compare_in_minutes(recipe: Recipe, minutes: float, console: Console) -> Path:
    """Choose methods, rates, steps and seeds for a recipe's data, say so, compare, and return the folder.

    The same call goes on where it was stopped, with what was chosen then.

    Raises:
        ValueError: the data cannot be used, or the time is too short.
    """
    if minutes <= 0:
        raise ValueError(f"minutes: {minutes:g} is not above 0")
    name = f"compare-{Path(str(recipe.data)).stem}-{minutes:g}-minutes"
    folder = user_path(recipe.output or Path("runs") / name)
    if (folder / PLAN).is_file() and not recipe.overwrite:
        planned = load_comparison(str(folder / PLAN)).recipe
        if (planned.data, planned.model, planned.task) != (recipe.data, recipe.model, recipe.task):
            raise ValueError(f"output: {folder} compares on {planned.data}; give another --output, or --overwrite")
        console.print(f"goes on in {folder}, as it was planned")
        return compare(str(folder / PLAN), output=str(folder), console=console)
    plan = plan_comparison(replace(recipe, output=None, overwrite=False), Comparison(methods=list(ORDER), selection=1))
    rows = shared_examples(plan, console)
    selection = min(Comparison().selection, max(1, len(rows.train) // 6))
    longest = max(1, steps_of(replace(recipe, steps=None), len(rows.train) - selection))
    fit = fit_to_time(60 * minutes, *time_of_runs(plan, longest, console), longest)
    block = {"methods": list(ORDER[: fit.methods]), "seeds": list(range(fit.seeds)), "selection": selection}
    chosen = replace(plan.recipe, steps=fit.steps)
    names = ", ".join(ORDER[: fit.methods])
    console.print(
        f"{fit.methods} methods ({names}), each at a third, once and three times its default rate, "
        f"{fit.steps} steps of {recipe.batch_size}, {fit.seeds} seeds: about {duration(fit.seconds)}. With the noise "
        f"of E2E a difference of {fit.detectable:.3f} in the loss is shown four times in five."
    )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "compare.yaml"
        path.write_text(yaml.safe_dump({**non_defaults(chosen), "compare": block}), encoding="utf-8")
        return compare(str(path), output=str(folder), overwrite=recipe.overwrite, console=console)


def time_of_runs(plan: ComparisonPlan, steps: int, console: Console) -> tuple[float, float]:
    """Return the seconds of a step and of all else in a run, by running the first method for a few steps.

    Raises:
        ValueError: the run failed.
    """
    first = plan.entries[0]
    trial = trial_of(plan, first, first.rates[0], plan.spec.seeds[0], max(PROBE, steps), PROBE)
    with (
        tempfile.TemporaryDirectory() as folder,
        workers(1, None, console) as machine,
        Runner(Path(folder), machine, console) as runner,
    ):
        began = time.monotonic()
        (result,) = runner.run([trial])
        taken = time.monotonic() - began
    if result is None:
        raise ValueError("the first run failed, with the reason above; inlay train shows all of it")
    step = max(result["seconds_per_step"], 1e-6)
    return step, max(0.0, taken - PROBE * step)
