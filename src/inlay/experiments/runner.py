"""Runs trials, so many at a time: what `inlay compare` and `inlay tune` share."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from inlay.experiments import trial
from inlay.experiments.trial import LOG, TRIAL, Trial, trial_process
from inlay.files.atomic import check_free, write_text
from inlay.files.untrusted import from_json
from inlay.models.loading import resolve
from inlay.recipe.recipe import Recipe
from inlay.training.checkpoints import METRICS
from inlay.training.examples import Examples
from inlay.training.progress import read_history

ORIGIN = "origin.json"  # beside what was asked: of which data and model
SAMPLES = 64  # places of a file of weights that are looked at
Asked = TypeVar("Asked")
Given = TypeVar("Given")


def steps_of(recipe: Recipe, examples: int) -> int:
    """The optimiser steps of a whole run."""
    return recipe.steps or math.ceil(recipe.epochs * examples / (int(recipe.batch_size) * recipe.accumulation))


def origin(recipe: Recipe, rows: Examples) -> dict[str, str]:
    """What tells the examples, and the weights of a local model by a sample, from others under the same name."""
    texts = json.dumps([rows.train, rows.heldout], default=lambda value: type(value).__name__)
    data, model = hashlib.sha256(texts.encode()), hashlib.sha256()
    for path in sorted(Path(resolve(recipe.model)).glob("*.safetensors")):
        size = path.stat().st_size
        model.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(SAMPLES):
                file.seek(size * part // SAMPLES)
                model.update(file.read(4096))
    return {"data": data.hexdigest(), "model": model.hexdigest()}


def open_folder(
    folder: Path,
    asked: Path,
    text: str,
    begun: dict[str, str],
    overwrite: bool,
    what: str,
    same: Callable[[str, str], bool] = str.__eq__,
) -> None:
    """A new folder for what `text` asks, which stands in its file `asked`, or the one that was begun for the `same`
    with the same `origin`, if it says one.

    Raises:
        ValueError: the folder holds something else.
    """
    kept = folder / ORIGIN
    if asked.is_file() and same(asked.read_text(encoding="utf-8"), text):
        known = from_json(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if not (other := [name for name, mark in begun.items() if known.get(name, mark) != mark]):
            write_text(asked, text)
            return
        if not overwrite:
            raise ValueError(
                f"the {' and the '.join(other)} changed since {folder} was begun, and its results would be of both; "
                "choose another output, or pass --overwrite"
            )
    elif asked.is_file() and not overwrite:
        raise ValueError(f"{folder} holds another {what}, see {asked}; choose another output, or pass --overwrite")
    check_free(folder, overwrite, asked.name)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        write_text(kept, json.dumps(begun))
        write_text(asked, text)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from None


class Process(Protocol):
    """A trial that runs, as multiprocessing's processes are asked of theirs."""

    @property
    def exitcode(self) -> int | None: ...

    def is_alive(self) -> bool: ...

    def join(self, timeout: float) -> None: ...

    def kill(self) -> None: ...


class Workers(Protocol):
    """What runs trials: so many at a time, each from its folder."""

    jobs: int

    def begin(self, folder: Path) -> Process: ...


class Processes:
    """Trials as processes of this machine.

    Raises:
        ValueError: `jobs` is below 1.
    """

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs: {jobs} is below 1")
        self.jobs = jobs
        # Each trial is forked from a process that has imported everything and done nothing. CUDA survives no fork.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([trial.__name__])
        self.context = multiprocessing.get_context("spawn") if torch.cuda.is_available() else processes

    def begin(self, folder: Path) -> Process:
        """Start the process of the trial in a folder."""
        process = self.context.Process(target=trial_process, args=(folder, max(1, (os.cpu_count() or 1) // self.jobs)))
        process.start()
        return process


class Runner:
    """Runs trials and shows how far they are.

    Args:
        hopeless: of a running trial's folder and the metrics it has written, whether to end it, as one of `pruned`.
    """

    def __init__(
        self,
        folder: Path,
        workers: Workers,
        console: Console,
        hopeless: Callable[[Path, list[dict[str, Any]]], bool] = lambda folder, rows: False,
    ) -> None:
        self.folder, self.workers, self.console, self.hopeless = folder, workers, console, hopeless
        self.live: set[Process] = set()
        self.pruned: set[Path] = set()
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

    def run(self, trials: Iterable[Trial]) -> list[dict[str, Any] | None]:
        """The results of trials, in their order; None for one that failed."""
        return self.map(self.one, trials)

    def map(self, work: Callable[[Asked], Given], items: Iterable[Asked]) -> list[Given]:
        """`work` on every item, each of which runs one trial; no process of theirs outlives what goes wrong."""
        items = list(items)
        self.bars.update(self.all, total=(self.bars.tasks[0].total or 0) + len(items))
        pool = ThreadPoolExecutor(self.workers.jobs)
        try:
            return list(pool.map(work, items))
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
        if self.ended:
            raise RuntimeError("no trial begins any more")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(folder / TRIAL, asked.to_json())
        bar = self.bars.add_task(asked.name, total=asked.stop, now="starts")
        code = self.wait(folder, bar)
        self.bars.remove_task(bar)
        if result := asked.result(folder):
            after = "diverged" if result["after"] is None else f"{result['after']:.3f}"
            self.console.print(f"{asked.name}: loss {result['before']:.3f} -> {after}, {result['seconds']:.0f} s")
        elif folder in self.pruned:
            last = [row for row in read_history(folder / METRICS) if "eval_loss" in row][-1]
            self.console.print(f"{asked.name}: pruned at step {last['step']}, loss {last['eval_loss']:.3f}")
        elif not self.ended:
            self.console.print(f"{asked.name} failed: {last_line(folder / LOG, code)}", style="yellow")
        return result

    def wait(self, folder: Path, task: TaskID) -> int | None:
        """Run a trial's process to its end, or until it is hopeless; gives its exit code."""
        process = self.workers.begin(folder)
        self.live.add(process)
        metrics, size = folder / METRICS, 0
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
        """How far a running trial is."""
        if at := next((row for row in reversed(rows) if "loss" in row), None):
            self.bars.update(task, completed=at["step"], now=f"loss {at['loss']:.3f}")


def last_line(log: Path, code: int | None) -> str:
    """Why a process ended, by the last line it said."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    why = "killed, perhaps for want of memory" if code == -9 else (lines or ["it said nothing"])[-1]
    return f"{why.strip()[:200]} (exit code {code}; see {log})"
