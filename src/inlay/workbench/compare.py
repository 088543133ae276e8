"""`inlay compare`: methods × learning rates × seeds on one task under one budget.

Each method's own learning rate is found by successive halving: every rung runs the first steps of the whole training
with fewer rates, judged by examples that neither train nor count in the end; the rate that is left runs with all seeds.
A run is a folder, finished once it has its result, so a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from inlay.workbench import budget, comparison, judge, models, standings, trial
from inlay.workbench.comparison import BUDGETS, Entry, Plan
from inlay.workbench.files import check_free, write_text
from inlay.workbench.prepare import Examples, examples
from inlay.workbench.recipe import Recipe
from inlay.workbench.standings import Sweep
from inlay.workbench.trial import LOG, TRIAL, Trial, unrelated

ASKED = "compare.yaml"  # also what marks a folder as a comparison's
PROBE = 4  # steps that are run to measure a step's time


def compare(
    path: str, jobs: int = 1, output: str | None = None, overwrite: bool = False, console: Console | None = None
) -> Path:
    """Run a comparison, or go on with it, and leave its results and its report in its folder, which is returned.

    Raises:
        ValueError: the recipe or the data cannot be used, the folder holds another comparison, or every run failed.
    """
    console = console or Console()
    if jobs < 1:
        raise ValueError(f"jobs: {jobs} is below 1")
    plan = comparison.load(path, output, overwrite)
    folder = Path(plan.recipe.output or Path("runs") / Path(path).stem).expanduser()
    rows = rows_of(plan, console)
    plan, shares = settle(plan, rows, console)
    open_folder(folder, plan, overwrite)
    steps = steps_of(plan.recipe, len(rows.train) - plan.ask.selection)
    with Runner(folder, plan, jobs, console) as runner:
        lengths = timed(runner, plan, steps)
        sweeps = sweep(runner, plan, lengths)
        finals = final(runner, plan, lengths, sweeps)
    standings.write(standings.Outcome(plan, folder, lengths, sweeps, finals, shares), console)
    return folder


def rows_of(plan: Plan, console: Console) -> Examples:
    """The examples of all runs, read once before the first.

    Raises:
        ValueError: they cannot be used, or none are left to train on.
    """
    first = replace(plan.recipe, seed=plan.ask.seeds[0])
    rows = examples(first, models.load_tokenizer(first.model, first.revision, first.trust_remote_code), console)
    unrelated(plan.ask.unrelated)
    if plan.ask.selection >= len(rows.train):
        raise ValueError(f"selection: {plan.ask.selection} of {len(rows.train)} examples leave none to train on")
    return rows


def settle(plan: Plan, rows: Examples, console: Console) -> tuple[Plan, dict[str, float]]:
    """The plan with sizes for its budget, and what share of it each method takes (none of one of time, yet)."""
    kind, limit = plan.ask.limit or ("time", 0)
    if kind == "time":
        return plan, {}
    cost = budget.cost_of(kind, rows)
    plan = replace(plan, entries=tuple(budget.solve(entry, cost, limit) for entry in plan.entries))
    shares = {entry.name: cost(entry.recipe) / limit for entry in plan.entries}
    for entry in plan.entries:
        size = standings.sized(entry) or "has no size to choose"
        console.print(f"{entry.name}: {size}, {shares[entry.name]:.1%} of the budget of {limit:g} {BUDGETS[kind]}")
    return plan, shares


def steps_of(recipe: Recipe, examples: int) -> int:
    """The optimiser steps of a whole run."""
    return recipe.steps or math.ceil(recipe.epochs * examples / (int(recipe.batch_size) * recipe.accumulation))


def open_folder(folder: Path, plan: Plan, overwrite: bool) -> None:
    """A new folder for a comparison, or the one it was begun in.

    Raises:
        ValueError: the folder holds something else.
    """
    asked = folder / ASKED
    if asked.is_file() and asked.read_text(encoding="utf-8") == plan.to_yaml():
        return
    if asked.is_file() and not overwrite:
        raise ValueError(f"{folder} holds another comparison, see {asked}; choose another output, or pass --overwrite")
    check_free(folder, overwrite, ASKED)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        write_text(asked, plan.to_yaml())
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from None


def timed(runner: Runner, plan: Plan, steps: int) -> dict[str, int]:
    """The steps of each method: the recipe's, and with a budget of time at most as many as a few that are run say."""
    kind, seconds = plan.ask.limit or ("", 0)
    if kind != "time":
        return {e.name: steps for e in plan.entries}
    found = runner.run([runner.trial(e, e.rates[0], runner.seeds[0], steps, min(PROBE, steps)) for e in plan.entries])
    return {
        e.name: steps if r is None else max(1, min(steps, int(seconds / max(r["seconds_per_step"], 1e-9))))
        for e, r in zip(plan.entries, found, strict=True)
    }


def sweep(runner: Runner, plan: Plan, lengths: dict[str, int]) -> dict[str, Sweep]:
    """Successive halving over each method's rates."""
    made = {e.name: Sweep(list(e.rates)) for e in plan.entries}
    for rung in range(max(len(rungs_of(plan, e, lengths)) for e in plan.entries) - 1):
        going = [e for e in plan.entries if rung < len(rungs_of(plan, e, lengths)) - 1]
        asked = [(e, rate) for e in going for rate in made[e.name].rates]
        stops = {e.name: rungs_of(plan, e, lengths)[rung][1] for e in going}
        trials = [runner.trial(e, rate, runner.seeds[0], lengths[e.name], stops[e.name]) for e, rate in asked]
        results = runner.run(trials)
        for e in going:
            losses = {rate: loss(r) for (own, rate), r in zip(asked, results, strict=True) if own is e}
            made[e.name].add(stops[e.name], losses, judge.survivors(losses, rungs_of(plan, e, lengths)[rung + 1][0]))
    return made


def rungs_of(plan: Plan, entry: Entry, lengths: dict[str, int]) -> list[tuple[int, int]]:
    """The rungs of one method."""
    return judge.rungs(len(entry.rates), lengths[entry.name], plan.ask.halving)


def final(
    runner: Runner, plan: Plan, lengths: dict[str, int], sweeps: dict[str, Sweep]
) -> dict[str, list[dict[str, Any] | None]]:
    """The results of each method at its rate, one for each seed; none for a method that no rate is left for."""
    asked = [(e, seed) for e in plan.entries if sweeps[e.name].rates for seed in runner.seeds]
    trials = [
        runner.trial(e, sweeps[e.name].rates[0], seed, lengths[e.name], lengths[e.name], True) for e, seed in asked
    ]
    results = runner.run(trials)
    return {e.name: [r for (own, _), r in zip(asked, results, strict=True) if own is e] for e in plan.entries}


def loss(result: dict[str, Any] | None) -> float:
    """A run's loss; infinite where it failed or diverged."""
    return math.inf if result is None or result["after"] is None else result["after"]


class Runner:
    """Runs trials in processes of their own, so many at a time, and shows how far they are."""

    def __init__(self, folder: Path, plan: Plan, jobs: int, console: Console) -> None:
        self.folder, self.plan, self.jobs, self.console = folder, plan, jobs, console
        self.seeds = plan.ask.seeds
        # Each trial is forked from a process that has imported everything and done nothing. CUDA survives no fork.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([trial.__name__])
        self.processes = multiprocessing.get_context("spawn") if torch.cuda.is_available() else processes
        self.live: set[BaseProcess] = set()
        self.ended = False
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
        )
        self.bars = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self.all = self.bars.add_task("all runs", total=0, now="")

    def __enter__(self) -> Runner:
        self.bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bars.stop()
        if isinstance(raised[1], KeyboardInterrupt):
            self.console.print(f"stopped; the same command goes on where it was, in {self.folder}")

    def trial(self, entry: Entry, rate: float, seed: int, steps: int, stop: int, final: bool = False) -> Trial:
        """A trial of an entry."""
        ask = self.plan.ask
        recipe = replace(entry.recipe, learning_rate=rate, seed=seed, steps=steps, output=None, overwrite=False)
        return Trial(entry.name, recipe, stop, final, ask.selection, self.seeds[0], ask.unrelated)

    def run(self, trials: Iterable[Trial]) -> list[dict[str, Any] | None]:
        """The results of trials, in their order; None for one that failed."""
        trials = list(trials)
        self.bars.update(self.all, total=(self.bars.tasks[0].total or 0) + len(trials))
        pool = ThreadPoolExecutor(self.jobs)
        try:
            return list(pool.map(self.one, trials))
        except BaseException:
            self.ended = True
            for process in list(self.live):  # or their threads would wait for them to end
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def one(self, asked: Trial) -> dict[str, Any] | None:
        """The result of a trial, which is run unless it is there."""
        folder = self.folder / "runs" / asked.name
        result = asked.result(folder) or self.carry_out(asked, folder)
        self.bars.advance(self.all)
        return result

    def carry_out(self, asked: Trial, folder: Path) -> dict[str, Any] | None:
        """Run a trial from its beginning, and say what became of it."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(folder / TRIAL, asked.to_json())
        bar = self.bars.add_task(asked.name, total=asked.stop, now="starts")
        code = self.wait(folder, bar)
        self.bars.remove_task(bar)
        if result := asked.result(folder):
            after = "diverged" if result["after"] is None else f"{result['after']:.3f}"
            self.console.print(f"{asked.name}: loss {result['before']:.3f} -> {after}, {result['seconds']:.0f} s")
        elif not self.ended:
            self.console.print(f"{asked.name} failed: {last_line(folder / LOG, code)}", style="yellow")
        return result

    def wait(self, folder: Path, task: TaskID) -> int | None:
        """Run a trial's process to its end; gives its exit code."""
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        process = self.processes.Process(target=trial.main, args=(folder, threads))
        process.start()
        self.live.add(process)
        while process.is_alive():
            process.join(0.2)
            self.show(folder / "metrics.jsonl", task)
        self.live.discard(process)
        return process.exitcode

    def show(self, metrics: Path, task: TaskID) -> None:
        """How far a running trial is."""
        if self.console.is_terminal and metrics.is_file():
            rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").split("\n")[:-1]]
            at = next((row for row in reversed(rows) if "loss" in row), None)
            self.bars.update(task, completed=at["step"], now=f"loss {at['loss']:.3f}") if at else None


def last_line(log: Path, code: int | None) -> str:
    """Why a process ended, by the last line it said."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    why = "killed, perhaps for want of memory" if code == -9 else (lines or ["it said nothing"])[-1]
    return f"{why.strip()[:200]} (exit code {code}; see {log})"
