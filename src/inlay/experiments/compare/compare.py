"""Compare methods × learning rates × seeds on one task under one budget (`inlay compare`).

Each method's own learning rate is found by successive halving (`sweep`): every rung runs the first steps of the whole
training with fewer rates, evaluated on examples used neither in training nor in the final losses; the rate that remains
runs with all seeds. A run is a folder, finished once it has its result, so a stopped comparison can be resumed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from inlay.evaluation.metric import load_metric
from inlay.experiments import ray_cluster
from inlay.experiments.compare.budget import budget_cost, solve_size
from inlay.experiments.compare.halving import rungs
from inlay.experiments.compare.outcome import Outcome, with_size
from inlay.experiments.compare.result_files import write_comparison
from inlay.experiments.compare.spec import BUDGETS, ComparisonPlan, Entry, load_comparison
from inlay.experiments.compare.sweep import Sweep
from inlay.experiments.ray_cluster import Cluster
from inlay.experiments.runner import Runner, experiment_folder, origin, steps_of
from inlay.experiments.trial import Trial, unrelated
from inlay.files.atomic import locked
from inlay.files.untrusted import user_path
from inlay.messages import Terminal
from inlay.training.arguments import check_means
from inlay.training.examples import Examples
from inlay.training.tasks import TASKS

PLAN = "compare.yaml"  # also marks a folder as a comparison's
PROBE = 4  # steps that are run to time a step


def compare(
    path: str,
    jobs: int | None = None,
    output: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    cluster: Cluster | None = None,
    given: dict[str, object] | None = None,
) -> Path:
    """Run or resume a comparison, and return its folder with the results and the report.

    Args:
        path: a recipe, with a `compare` block or without.
        jobs: runs at a time; None: one locally, on a cluster as many as it has room for.
        output: the folder; None: the recipe's, or runs/ and the recipe's name.
        overwrite: replace the folder of another comparison.
        console: for messages.
        cluster: the Ray cluster that runs the trials; None: this machine.
        given: fields that override the recipe's.

    Raises:
        ValueError: the recipe or the data cannot be used, the folder is in use or holds another comparison or one of
            other data, Ray is requested and not installed, or every run failed.
    """
    console = console or Terminal()
    plan = load_comparison(path, output, overwrite, given)
    for entry in plan.entries:
        check_means(entry.recipe)
    folder = user_path(plan.recipe.output or Path("runs") / Path(path).stem)
    with ray_cluster.workers(jobs, cluster, console) as workers, locked(folder):
        rows = shared_examples(plan, console)
        plan, shares = settle_sizes(plan, rows, console)
        checksums = origin(plan.recipe, rows)
        steps = steps_of(plan.recipe, len(rows.train) - plan.spec.selection)
        with experiment_folder(folder, folder / PLAN, plan.to_yaml(), checksums, overwrite, "comparison"):
            with Runner(folder, workers, console) as runner:
                lengths = timed(runner, plan, steps)
                sweeps = sweep_rates(runner, plan, lengths)
                finals = final_runs(runner, plan, lengths, sweeps)
            write_comparison(Outcome(plan, folder, lengths, sweeps, finals, shares), console)
    return folder


def shared_examples(plan: ComparisonPlan, console: Console) -> Examples:
    """Return the examples of all runs, read once before the first.

    Raises:
        ValueError: the examples or the metric cannot be used, or no examples are left to train on.
    """
    first = replace(plan.recipe, seed=plan.spec.seeds[0])
    task = TASKS[first.task]
    rows = task.examples(first, task.processor(first), console)
    unrelated(plan.spec.unrelated)
    if plan.spec.metric and plan.spec.metric not in task.metrics:
        load_metric(plan.spec.metric)
    if plan.spec.selection >= len(rows.train):
        raise ValueError(f"selection: {plan.spec.selection} of {len(rows.train)} examples leave none to train on")
    return rows


def settle_sizes(plan: ComparisonPlan, rows: Examples, console: Console) -> tuple[ComparisonPlan, dict[str, float]]:
    """Return the plan with sizes for its budget, and the share of the budget that each method takes.

    There are no shares yet for a budget of time.
    """
    kind, limit = plan.spec.limit or ("time", 0)
    if kind == "time":
        return plan, {}
    cost = budget_cost(kind, rows)
    plan = replace(plan, entries=tuple(solve_size(entry, cost, limit, rows) for entry in plan.entries))
    shares = {entry.name: cost(entry.recipe) / limit for entry in plan.entries}
    for entry in plan.entries:
        size = with_size(entry) or "has no size to choose"
        console.print(f"{entry.name}: {size}, {shares[entry.name]:.1%} of the budget of {limit:g} {BUDGETS[kind]}")
    return plan, shares


def timed(runner: Runner, plan: ComparisonPlan, steps: int) -> dict[str, int]:
    """Return the steps of each method: the recipe's, or fewer under a budget of time, by timing a few."""
    kind, seconds = plan.spec.limit or ("", 0)
    if kind != "time":
        return {e.name: steps for e in plan.entries}
    seed = plan.spec.seeds[0]
    probes = runner.run([trial_of(plan, e, e.rates[0], seed, steps, min(PROBE, steps)) for e in plan.entries])
    return {
        e.name: steps if r is None else max(1, min(steps, int(seconds / max(r["seconds_per_step"], 1e-9))))
        for e, r in zip(plan.entries, probes, strict=True)
    }


def sweep_rates(runner: Runner, plan: ComparisonPlan, lengths: dict[str, int]) -> dict[str, Sweep]:
    """Choose among each method's rates by successive halving."""
    spec = plan.spec
    ladders = {e.name: rungs(len(e.rates), lengths[e.name], spec.halving) for e in plan.entries}
    sweeps = {e.name: Sweep(list(e.rates), ladders[e.name], spec.extend, spec.margin) for e in plan.entries}
    while due := [(e, steps, rate) for e in plan.entries for steps, rate in sweeps[e.name].due()]:
        trials = [trial_of(plan, e, rate, spec.seeds[0], lengths[e.name], steps) for e, steps, rate in due]
        results = runner.run(trials)
        for e in plan.entries:
            own = {rate: r for (entry, _, rate), r in zip(due, results, strict=True) if entry is e}
            if own:
                sweeps[e.name].take(own)
    return sweeps


def final_runs(
    runner: Runner, plan: ComparisonPlan, lengths: dict[str, int], sweeps: dict[str, Sweep]
) -> dict[str, list[dict[str, Any] | None]]:
    """Return the results of each method at its rate, one per seed; none where no rate is left."""
    pairs = [(e, seed) for e in plan.entries if sweeps[e.name].rates for seed in plan.spec.seeds]
    trials = [
        trial_of(plan, e, sweeps[e.name].rates[0], seed, lengths[e.name], lengths[e.name], True) for e, seed in pairs
    ]
    results = runner.run(trials)
    return {e.name: [r for (entry, _), r in zip(pairs, results, strict=True) if entry is e] for e in plan.entries}


def trial_of(
    plan: ComparisonPlan, entry: Entry, rate: float, seed: int, steps: int, stop: int, final: bool = False
) -> Trial:
    """Return a trial of an entry."""
    spec = plan.spec
    recipe = replace(entry.recipe, learning_rate=rate, seed=seed, steps=steps, output=None, overwrite=False)
    metric = spec.metric if final else None
    return Trial(entry.name, recipe, stop, final, spec.selection, spec.seeds[0], spec.unrelated, metric=metric)
