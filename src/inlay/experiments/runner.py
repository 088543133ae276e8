"""Run trials, several at a time, for `inlay compare` and `inlay tune`."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import TaskID, TimeElapsedColumn

from inlay.experiments import trial as trial_module
from inlay.experiments.trial import LOG, TRIAL, Trial, trial_process
from inlay.files.atomic import check_free, put_back, remove_siblings, siblings, staged, write_text
from inlay.files.untrusted import from_json, read_regular, regular_file, user_path
from inlay.messages import progress_bars
from inlay.methods import imports
from inlay.models.loading import resolve
from inlay.recipe.named_code import code_digests, file_digest
from inlay.recipe.recipe import Recipe
from inlay.recipe.rewards import reward_places
from inlay.training.arguments import optimizer_steps
from inlay.training.checkpoints import METRICS
from inlay.training.examples import Examples
from inlay.training.progress import read_history

ORIGIN = "origin.json"  # beside the plan: checksums of the data and the model
QUIET_SERVER = "inlay.experiments.quiet_server"
SAMPLES = 64  # places of a file of weights that enter its checksum
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def steps_of(recipe: Recipe, examples: int) -> int:
    """Return the optimiser steps of a whole run on so many `examples`."""
    if recipe.task == "grpo":
        return optimizer_steps(recipe, examples, int(recipe.batch_size))
    return recipe.steps or math.ceil(recipe.epochs * examples / (int(recipe.batch_size) * recipe.accumulation))


def origin(recipe: Recipe, rows: Examples) -> dict[str, str]:
    """Return checksums of the examples, of code that the recipe names and, by a sample, of a local model's weights.

    They reveal what changed under the same name.
    """
    texts = json.dumps([rows.train, rows.heldout], default=lambda value: type(value).__name__)
    data = hashlib.sha256(texts.encode())
    model = hashlib.sha256()
    for path in sorted(Path(resolve(recipe.model)).glob("*.safetensors")):
        size = path.stat().st_size
        model.update(f"{path.name} {size}".encode())
        with regular_file(path).open("rb") as file:
            for part in range(SAMPLES):
                file.seek(size * part // SAMPLES)
                model.update(file.read(4096))
    template = user_path(recipe.chat_template or "")
    shown = {"chat template": file_digest(template)} if template.is_file() else {}
    return {"data": data.hexdigest(), "model": model.hexdigest(), **shown, **code_digests(recipe)}


@contextmanager
def experiment_folder(
    folder: Path,
    plan: Path,
    text: str,
    checksums: dict[str, str],
    overwrite: bool,
    what: str,
    same: Callable[[str, str], bool] = str.__eq__,
) -> Iterator[None]:
    """Create a folder for a plan, or accept one that was started for the same plan and the same `origin`.

    What it replaces is kept beside it until the block ends, and is put back where the block ends before any run begins.

    Args:
        folder: of the experiment, which is locked.
        plan: the file in it that holds the plan.
        text: the plan.
        checksums: from `origin`.
        overwrite: replace a folder of another plan.
        what: "comparison" or "search", for messages.
        same: compares the old and the new text of a plan.

    Raises:
        ValueError: the folder holds something else.
    """
    put_back(folder)
    remove_siblings(folder, "part")
    start_experiment(folder, plan, text, checksums, overwrite, what, same)
    try:
        yield
    except BaseException:
        if siblings(folder, "old") and not any(folder.rglob(TRIAL)):
            shutil.rmtree(folder, ignore_errors=True)
            put_back(folder)
        raise
    remove_siblings(folder, "old")


def start_experiment(
    folder: Path,
    plan: Path,
    text: str,
    checksums: dict[str, str],
    overwrite: bool,
    what: str,
    same: Callable[[str, str], bool],
) -> None:
    """Put a folder with a plan and its `origin` in place, unless there is one, as `experiment_folder` says."""
    origin_file = folder / ORIGIN
    if plan.is_file() and same(read_regular(plan), text):
        before = from_json(read_regular(origin_file)) if origin_file.is_file() else {}
        changed = [name for name, checksum in checksums.items() if before.get(name, checksum) != checksum]
        if not changed:
            write_text(plan, text)
            return
        if not overwrite:
            raise ValueError(
                f"the {' and the '.join(changed)} changed since {folder} was started, so its results would mix both; "
                "choose another output, or pass --overwrite"
            )
    elif plan.is_file() and not overwrite:
        raise ValueError(f"{folder} holds another {what}, see {plan}; choose another output, or pass --overwrite")
    check_free(folder, overwrite, plan.name)
    try:
        with staged(folder) as part:
            write_text(part / origin_file.name, json.dumps(checksums))
            write_text(part / plan.name, text)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from None


class Process(Protocol):
    """Define the part of multiprocessing's process interface that `Runner` uses."""

    @property
    def exitcode(self) -> int | None: ...

    def is_alive(self) -> bool: ...

    def join(self, timeout: float) -> None: ...

    def kill(self) -> None: ...


class Workers(Protocol):
    """Define what runs trials: `jobs` at a time, each from its folder."""

    jobs: int

    def begin(self, folder: Path) -> Process: ...


class Processes:
    """Run trials as processes of this machine.

    Raises:
        ValueError: `jobs` is below 1.
    """

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs: {jobs} is below 1")
        self.jobs = jobs
        # Each trial is forked from a server that has imported everything and run nothing; CUDA does not survive a fork.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([QUIET_SERVER, trial_module.__name__])
        self.context = multiprocessing.get_context("spawn") if torch.cuda.is_available() else processes

    def begin(self, folder: Path) -> Process:
        """Start the process of the trial in a folder."""
        threads = max(1, torch.get_num_threads() // self.jobs)  # which obey OMP_NUM_THREADS
        process = self.context.Process(target=trial_process, args=(folder, threads, imports(), reward_places()))
        process.start()
        return process


class Runner:
    """Run trials and show their progress.

    Args:
        folder: of the experiment.
        workers: run the trials.
        console: for messages and progress bars.
        hopeless: decides from a running trial's folder and metrics whether to end it, as one of `pruned`.
    """

    def __init__(
        self,
        folder: Path,
        workers: Workers,
        console: Console,
        hopeless: Callable[[Path, list[dict[str, Any]]], bool] = lambda folder, rows: False,
    ) -> None:
        self.folder = folder
        self.workers = workers
        self.console = console
        self.hopeless = hopeless
        self.live: set[Process] = set()
        self.pruned: set[Path] = set()
        self.ended = False
        self.bars = progress_bars(console, TimeElapsedColumn())
        self.all = self.bars.add_task("all runs", total=0, now="")

    def __enter__(self) -> Runner:
        self.bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bars.stop()
        if isinstance(raised[1], KeyboardInterrupt):
            self.console.print(f"stopped; the same command resumes in {self.folder}")

    def run(self, trials: Iterable[Trial]) -> list[dict[str, Any] | None]:
        """Return the results of trials, in order; None for one that failed."""
        return self.map(self.one, trials)

    def map(self, work: Callable[[Item], Outcome], items: Iterable[Item]) -> list[Outcome]:
        """Call `work`, which runs one trial, on every item; kill all running trials if anything fails."""
        items = list(items)
        self.bars.update(self.all, total=(self.bars.tasks[0].total or 0) + len(items))
        pool = ThreadPoolExecutor(self.workers.jobs)
        try:
            return list(pool.map(work, items))
        except BaseException as error:
            self.ended = True
            if isinstance(error, KeyboardInterrupt):
                self.console.print("stopping; trials that are running start again from their beginning")
            for process in list(self.live):  # else their threads would wait for them
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def one(self, trial: Trial) -> dict[str, Any] | None:
        """Return the result of a trial, running it unless its result exists."""
        folder = self.folder / "runs" / trial.name
        result = trial.result(folder) or self.start(trial, folder)
        if not self.ended:  # a trial that was killed is none of those that are done
            self.bars.advance(self.all)
        return result

    def start(self, trial: Trial, folder: Path) -> dict[str, Any] | None:
        """Run a trial from its beginning, and print its outcome."""
        if self.ended:
            raise RuntimeError("no trial is started any more")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(folder / TRIAL, trial.to_json())
        bar = self.bars.add_task(trial.name, total=trial.stop, now="starts")
        code = self.wait(folder, bar)
        self.bars.remove_task(bar)
        if result := trial.result(folder):
            after = "diverged" if result["after"] is None else f"{result['after']:.3f}"
            self.console.print(f"{trial.name}: loss {result['before']:.3f} -> {after}, {result['seconds']:.0f} s")
        elif folder in self.pruned:
            last = [row for row in read_history(folder / METRICS) if "eval_loss" in row][-1]
            self.console.print(f"{trial.name}: pruned at step {last['step']}, loss {last['eval_loss']:.3f}")
        elif not self.ended:
            self.console.print(f"{trial.name} failed: {last_line(folder / LOG, code)}", style="yellow")
        return result

    def wait(self, folder: Path, task: TaskID) -> int | None:
        """Run a trial's process to its end, or until it is hopeless; return its exit code."""
        process = self.workers.begin(folder)
        self.live.add(process)
        if self.ended:  # it began while the others were ended
            process.kill()
        metrics = folder / METRICS
        size = 0
        while process.is_alive():
            process.join(0.2)
            if metrics.is_file() and size != (size := metrics.stat().st_size):
                self.show(rows := read_history(metrics), task)
                if self.hopeless(folder, rows):
                    self.pruned.add(folder)
                    process.kill()
        self.live.discard(process)
        return process.exitcode

    def show(self, rows: list[dict[str, Any]], task: TaskID) -> None:
        """Show the progress of a running trial."""
        if last := next((row for row in reversed(rows) if "loss" in row), None):
            self.bars.update(task, completed=last["step"], now=f"loss {last['loss']:.3f}")


def last_line(log: Path, code: int | None) -> str:
    """Explain why a process ended, from the last line of its log and its exit code."""
    lines = [
        line for line in regular_file(log).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    ]
    why = "killed, perhaps out of memory" if code == -9 else (lines or ["it printed nothing"])[-1]
    return f"{why.strip()[:200]} (exit code {code}; see {log})"
