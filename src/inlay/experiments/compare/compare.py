"""`inlay compare`: methods × learning rates × seeds on one task under one budget.

Each method's own learning rate is found by successive halving: every rung runs the first steps of the whole training
with fewer rates, judged by examples that neither train nor count in the end; the rate that is left runs with all seeds.
A run is a folder, finished once it has its result, so a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from inlay.evaluation.metric import load_metric
from inlay.experiments import ray_cluster
from inlay.experiments.compare.budget import budget_cost, solve_size
from inlay.experiments.compare.halving import rungs, survivors
from inlay.experiments.compare.outcome import Outcome, Sweep, with_size
from inlay.experiments.compare.result_files import write_comparison
from inlay.experiments.compare.spec import BUDGETS, ComparisonPlan, Entry, load_comparison
from inlay.experiments.ray_cluster import Cluster
from inlay.experiments.runner import Runner, open_folder, origin, steps_of
from inlay.experiments.trial import Trial, unrelated
from inlay.files.atomic import locked
from inlay.training.examples import Examples, load_examples
from inlay.training.run_tokenizer import run_tokenizer

ASKED = "compare.yaml"  # also what marks a folder as a comparison's
PROBE = 4  # steps that are run to measure a step's time


def compare(
    path: str,
    jobs: int | None = None,
    output: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    cluster: Cluster | None = None,
) -> Path:
    """Run a comparison, or go on with it, and leave its results and its report in its folder, which is returned.

    Raises:
        ValueError: the recipe or the data cannot be used, the folder holds another comparison, or one of other data,
            or is in use, Ray is asked for and not there, or every run failed.
    """
    console = console or Console()
    plan = load_comparison(path, output, overwrite)
    folder = Path(plan.recipe.output or Path("runs") / Path(path).stem).expanduser()
    with ray_cluster.workers(jobs, cluster, console) as workers, locked(folder):
        rows = shared_examples(plan, console)
        plan, shares = settle_sizes(plan, rows, console)
        begun = origin(plan.recipe, rows)
        open_folder(folder, folder / ASKED, plan.to_yaml(), begun, overwrite, "comparison")
        steps = steps_of(plan.recipe, len(rows.train) - plan.ask.selection)
        with Runner(folder, workers, console) as runner:
            lengths = timed(runner, plan, steps)
            sweeps = sweep_rates(runner, plan, lengths)
            finals = final_runs(runner, plan, lengths, sweeps)
        write_comparison(Outcome(plan, folder, lengths, sweeps, finals, shares), console)
    return folder


def shared_examples(plan: ComparisonPlan, console: Console) -> Examples:
    """The examples of all runs, read once before the first.

    Raises:
        ValueError: they or what runs are judged by cannot be used, or none are left to train on.
    """
    first = replace(plan.recipe, seed=plan.ask.seeds[0])
    rows = load_examples(first, run_tokenizer(first), console)
    unrelated(plan.ask.unrelated)
    if plan.ask.metric:
        load_metric(plan.ask.metric)
    if plan.ask.selection >= len(rows.train):
        raise ValueError(f"selection: {plan.ask.selection} of {len(rows.train)} examples leave none to train on")
    return rows


def settle_sizes(plan: ComparisonPlan, rows: Examples, console: Console) -> tuple[ComparisonPlan, dict[str, float]]:
    """The plan with sizes for its budget, and what share of it each method takes (none of one of time, yet)."""
    kind, limit = plan.ask.limit or ("time", 0)
    if kind == "time":
        return plan, {}
    cost = budget_cost(kind, rows)
    plan = replace(plan, entries=tuple(solve_size(entry, cost, limit) for entry in plan.entries))
    shares = {entry.name: cost(entry.recipe) / limit for entry in plan.entries}
    for entry in plan.entries:
        size = with_size(entry) or "has no size to choose"
        console.print(f"{entry.name}: {size}, {shares[entry.name]:.1%} of the budget of {limit:g} {BUDGETS[kind]}")
    return plan, shares


def timed(runner: Runner, plan: ComparisonPlan, steps: int) -> dict[str, int]:
    """The steps of each method: the recipe's, and with a budget of time at most as many as a few that are run say."""
    kind, seconds = plan.ask.limit or ("", 0)
    if kind != "time":
        return {e.name: steps for e in plan.entries}
    seed = plan.ask.seeds[0]
    found = runner.run([trial_of(plan, e, e.rates[0], seed, steps, min(PROBE, steps)) for e in plan.entries])
    return {
        e.name: steps if r is None else max(1, min(steps, int(seconds / max(r["seconds_per_step"], 1e-9))))
        for e, r in zip(plan.entries, found, strict=True)
    }


def sweep_rates(runner: Runner, plan: ComparisonPlan, lengths: dict[str, int]) -> dict[str, Sweep]:
    """Successive halving over each method's rates."""
    made = {e.name: Sweep(list(e.rates)) for e in plan.entries}
    for rung in range(max(len(rungs_of(plan, e, lengths)) for e in plan.entries) - 1):
        going = [e for e in plan.entries if rung < len(rungs_of(plan, e, lengths)) - 1]
        asked = [(e, rate) for e in going for rate in made[e.name].rates]
        stops = {e.name: rungs_of(plan, e, lengths)[rung][1] for e in going}
        trials = [trial_of(plan, e, rate, plan.ask.seeds[0], lengths[e.name], stops[e.name]) for e, rate in asked]
        results = runner.run(trials)
        for e in going:
            given = {rate: r for (own, rate), r in zip(asked, results, strict=True) if own is e}
            losses = {rate: loss_of(r) for rate, r in given.items()}
            made[e.name].failed += [rate for rate, r in given.items() if r is None]
            made[e.name].add(stops[e.name], losses, survivors(losses, rungs_of(plan, e, lengths)[rung + 1][0]))
    return made


def rungs_of(plan: ComparisonPlan, entry: Entry, lengths: dict[str, int]) -> list[tuple[int, int]]:
    """The rungs of one method."""
    return rungs(len(entry.rates), lengths[entry.name], plan.ask.halving)


def final_runs(
    runner: Runner, plan: ComparisonPlan, lengths: dict[str, int], sweeps: dict[str, Sweep]
) -> dict[str, list[dict[str, Any] | None]]:
    """The results of each method at its rate, one for each seed; none for a method that no rate is left for."""
    asked = [(e, seed) for e in plan.entries if sweeps[e.name].rates for seed in plan.ask.seeds]
    trials = [
        trial_of(plan, e, sweeps[e.name].rates[0], seed, lengths[e.name], lengths[e.name], True) for e, seed in asked
    ]
    results = runner.run(trials)
    return {e.name: [r for (own, _), r in zip(asked, results, strict=True) if own is e] for e in plan.entries}


def loss_of(result: dict[str, Any] | None) -> float:
    """A run's loss; infinite where it failed or diverged."""
    return math.inf if result is None or result["after"] is None else result["after"]


def trial_of(
    plan: ComparisonPlan, entry: Entry, rate: float, seed: int, steps: int, stop: int, final: bool = False
) -> Trial:
    """A trial of an entry."""
    ask = plan.ask
    recipe = replace(entry.recipe, learning_rate=rate, seed=seed, steps=steps, output=None, overwrite=False)
    judged = ask.metric if final else None
    return Trial(entry.name, recipe, stop, final, ask.selection, ask.seeds[0], ask.unrelated, metric=judged)
