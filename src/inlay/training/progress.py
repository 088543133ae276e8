"""Following a run: a bar on a terminal, lines in a log file, `metrics.jsonl` for everything else."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from inlay.files.atomic import write_text
from inlay.files.untrusted import DamagedFileError
from inlay.host import distributed
from inlay.messages import duration, gib, loading
from inlay.models.sizes import count_trainable
from inlay.training.checkpoints import METRICS


class RunProgress(TrainerCallback):
    """Follows a run: `metrics.jsonl`, and a bar on a terminal or a line now and then in a log file.

    The rows of training steps are in that file alone: a hundred thousand of them would be a hundred MB in memory, and
    again in every checkpoint. `evaluated` are the others.
    """

    def __init__(self, folder: Path, console: Console, metrics: Sequence[str] = ()) -> None:
        self.file, self.console, self.metrics = folder / METRICS, console, [f"eval_{name}" for name in metrics]
        self.evaluated: list[dict[str, Any]] = []
        self.first: int | None = None  # how many numbers the first step trained
        self.started, self.tokens = time.perf_counter(), 0
        self.passed: dict[int, str] = {}  # the steps that they passed over, and why
        self.spent, self.read = 0.0, 0  # seconds and tokens of the processes before this one
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=None, now="")

    def restore(self, checkpoint: Path) -> None:
        """Go on where the metrics in a checkpoint end.

        Raises:
            ValueError: they are none.
        """
        with loading(f"{checkpoint / METRICS}", DamagedFileError):
            text = (checkpoint / METRICS).read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            self.evaluated = [row for row in rows if "eval_loss" in row]
            if not all(isinstance(row["eval_loss"], float) for row in self.evaluated or [{"eval_loss": None}]):
                raise ValueError("it has no evaluations")
            self.passed = {row["step"]: row["passed_over"] for row in rows if "passed_over" in row}
            self.first = next((row["trained"] for row in rows if "trained" in row), None)
            last = next((row for row in reversed(rows) if "seconds" in row), {"seconds": 0.0, "tokens": 0})
            self.spent, self.read = float(last["seconds"]), int(last["tokens"])
        self.tokens = self.read
        write_text(self.file, text) if distributed.is_first() else None

    @property
    def history(self) -> list[dict[str, Any]]:
        """All rows so far; in other processes than the one that writes them, those of evaluations."""
        return read_history(self.file) if distributed.is_first() else self.evaluated

    @property
    def seconds(self) -> float:
        """Of training, over all processes of the run."""
        return self.spent + time.perf_counter() - self.started

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()
        self.bar.update(self.task, total=state.max_steps)
        self.bar.start()

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, model=None, **kwargs) -> None:
        logs = logs or {}
        names = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy", "eval_mean_token_accuracy")
        row = {
            "step": state.global_step,
            **{name: logs[name] for name in (*names, *self.metrics, "passed_over") if name in logs},
        }
        if "loss" in logs:
            self.tokens = self.read + int(logs.get("num_tokens", self.tokens - self.read))  # trl counts from zero,
            self.tokens = int(state.num_input_tokens_seen) or self.tokens  # transformers over the whole run
            row |= {"tokens": self.tokens, "seconds": round(self.seconds, 3), "memory": peak_memory()}
            row |= {"trained": count_trainable(model)} if model is not None else {}
            self._show(state, row)
        if "passed_over" in row:
            self.console.print(f"step {state.global_step} is passed over: {row['passed_over']}", style="yellow")
        if row.keys() & {"loss", "eval_loss", "passed_over"}:
            if not self.evaluated and "eval_loss" in row:
                self.console.print(f"held-out loss before: {row['eval_loss']:.3f}")
            self.evaluated += [row] if "eval_loss" in row else []
            if distributed.is_first():
                with self.file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
        state.log_history[:] = [kept for kept in state.log_history if "loss" not in kept]

    def _show(self, state, row: dict[str, Any]) -> None:
        speed = row["tokens"] / max(row["seconds"], 1e-9)
        now = f"loss {row['loss']:.3f}  {speed:,.0f} tokens/s  {gib(row['memory'])}"
        now += f"  {row['trained']:,} trained" if self.falls(row) else ""
        self.bar.update(self.task, completed=state.global_step, now=now)
        if not self.console.is_terminal and state.global_step % max(1, state.max_steps // 20) == 0:
            left = row["seconds"] / state.global_step * (state.max_steps - state.global_step)
            self.console.print(f"step {state.global_step}/{state.max_steps}  {now}  {duration(left)} left")

    def falls(self, row: dict[str, Any]) -> bool:
        """Whether a schedule has frozen anything since the first step, so that the number is worth a look."""
        self.first = self.first or row.get("trained")
        return row.get("trained", self.first) != self.first

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.stop()


def read_history(metrics: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that may be being written."""
    text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def peak_memory() -> int:
    """Peak bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
