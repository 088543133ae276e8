"""Follow a run: a bar on a terminal, lines in a log file, and `metrics.jsonl` for everything else."""

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
from rich.progress import TimeRemainingColumn
from transformers import TrainerCallback

from inlay.files.atomic import write_text
from inlay.files.untrusted import DamagedFileError, read_regular
from inlay.host import distributed
from inlay.messages import duration, gib, loading, progress_bars
from inlay.models.sizes import count_trainable
from inlay.training.checkpoints import METRICS


class RunProgress(TrainerCallback):
    """Follow a run with `metrics.jsonl`, and with a bar on a terminal or occasional lines in a log file.

    The rows of training steps are in that file alone: a hundred thousand of them would take a hundred MB in memory, and
    again in every checkpoint. `evaluated` holds the other rows.
    """

    def __init__(self, folder: Path, console: Console, metrics: Sequence[str] = ()) -> None:
        self.file = folder / METRICS
        self.console = console
        self.metrics = [*metrics, *(f"eval_{name}" for name in metrics)]
        self.evaluated: list[dict[str, Any]] = []
        self.first: int | None = None  # how many parameters the first step trained
        self.started = time.perf_counter()
        self.tokens = 0
        self.passed: dict[int, str] = {}  # the steps that were skipped, and why
        self.spent, self.read = 0.0, 0  # seconds and tokens before the run was resumed
        self.bar = progress_bars(console, TimeRemainingColumn())
        self.task = self.bar.add_task("training", total=None, now="")

    def restore(self, checkpoint: Path) -> None:
        """Continue where the metrics in a checkpoint end.

        Raises:
            ValueError: its metrics cannot be read.
        """
        with loading(f"{checkpoint / METRICS}", DamagedFileError):
            text = read_regular(checkpoint / METRICS)
            rows = [json.loads(line) for line in text.splitlines()]
            self.evaluated = [row for row in rows if "eval_loss" in row]
            if not all(isinstance(row["eval_loss"], float) for row in self.evaluated or [{"eval_loss": None}]):
                raise ValueError("it has no evaluations")
            self.passed = {row["step"]: row["passed_over"] for row in rows if "passed_over" in row}
            self.first = next((row["trained"] for row in rows if "trained" in row), None)
            last = next((row for row in reversed(rows) if "seconds" in row), {"seconds": 0.0, "tokens": 0})
            self.spent, self.read = float(last["seconds"]), int(last["tokens"])
        self.tokens = self.read
        if distributed.is_first():
            write_text(self.file, text)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return all rows so far; in processes that do not write them, the rows of evaluations."""
        return read_history(self.file) if distributed.is_first() else self.evaluated

    @property
    def seconds(self) -> float:
        """Return the seconds of training, including those before the run was resumed."""
        return self.spent + time.perf_counter() - self.started

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()
        self.bar.update(self.task, total=state.max_steps)
        self.bar.start()

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, model=None, **kwargs) -> None:
        logs = logs or {}
        names = ("loss", "penalty", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy")
        names += ("eval_mean_token_accuracy",)
        row = {
            "step": state.global_step,
            **{name: logs[name] for name in (*names, *self.metrics, "passed_over") if name in logs},
        }
        if "loss" in logs:
            # trl counts from the start of this process, transformers over the whole run.
            self.tokens = self.read + int(logs.get("num_tokens", self.tokens - self.read))
            self.tokens = int(state.num_input_tokens_seen) or self.tokens
            row |= {"tokens": self.tokens, "seconds": round(self.seconds, 3), "memory": peak_memory()}
            if model is not None:
                row["trained"] = count_trainable(model)
            self._show(state, row)
        if "passed_over" in row:
            self.console.print(f"step {state.global_step} is skipped: {row['passed_over']}", style="yellow")
        if row.keys() & {"loss", "eval_loss", "passed_over"}:
            if not self.evaluated and "eval_loss" in row:
                self.console.print(f"held-out loss before: {row['eval_loss']:.3f}")
            if "eval_loss" in row:
                self.evaluated.append(row)
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
        """Return whether a schedule has frozen parameters since the first step."""
        self.first = self.first or row.get("trained")
        return row.get("trained", self.first) != self.first

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.stop()


def read_history(metrics: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a metrics.jsonl, which may still be written."""
    text = read_regular(metrics) if metrics.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def peak_memory() -> int:
    """Return the peak bytes of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
