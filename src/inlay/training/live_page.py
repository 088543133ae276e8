"""`inlay ui`: running and finished runs in TensorBoard, on this machine alone.

Runs write metrics.jsonl, whatever becomes of them. A thread follows those files and hands what is new to TensorBoard,
which lays runs over each other; its own files are gone with the process.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from inlay.training.checkpoints import METRICS

HOST = "127.0.0.1"
NAMES = {
    "loss": "loss/training",
    "eval_loss": "loss/held out",
    "mean_token_accuracy": "token accuracy/training",
    "eval_mean_token_accuracy": "token accuracy/held out",
    "learning_rate": "optimiser/learning rate",
    "grad_norm": "optimiser/gradient norm",
    "memory": "cost/peak memory (bytes)",
    "tokens": "cost/tokens",
    "trained": "cost/trained numbers",
}


def board() -> Any:
    """TensorBoard's program.

    Raises:
        ValueError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it brings along
            from tensorboard import program
    except ImportError:
        raise ValueError("inlay ui needs TensorBoard; pip install 'inlay[ui]'") from None
    return program


@dataclass
class WatchedRun:
    """A metrics.jsonl that is followed, and how far it was read."""

    metrics: Path
    writer: Any
    file: int = 0  # its inode: a run that goes on writes its metrics anew
    read: int = 0
    seconds: float = 0.0

    def follow(self) -> None:
        """Hand on the whole lines that are new."""
        status = self.metrics.stat()
        if status.st_ino != self.file or status.st_size < self.read:
            self.file, self.read, self.seconds = status.st_ino, 0, 0.0
        with self.metrics.open("rb") as file:
            file.seek(self.read)
            text, end, _ = file.read().rpartition(b"\n")
        self.read += len(text) + len(end)
        began = (self.metrics.parent / "recipe.yaml").stat().st_mtime
        for line in text.splitlines():
            try:
                row = json.loads(line)
                step, self.seconds = row["step"], float(row.get("seconds", self.seconds))
                for name in row.keys() & NAMES.keys():
                    self.writer.add_scalar(NAMES[name], float(row[name]), step, walltime=began + self.seconds)
            except (ValueError, TypeError, KeyError) as error:
                print(f"note: {self.metrics}: {line[:80]!r} is left out: {error!r}", file=sys.stderr)
        self.writer.flush()


class Follower(threading.Thread):
    """Follows every run under a folder, those that begin later too, once in `every` seconds."""

    def __init__(self, runs: Path, events: Path, every: float = 2.0) -> None:
        super().__init__(daemon=True)
        self.runs, self.events, self.every = runs, events, every
        self.known: dict[Path, WatchedRun] = {}
        self.over = threading.Event()

    def look(self) -> None:
        """Read what is new in all runs."""
        from torch.utils.tensorboard import SummaryWriter

        for metrics in sorted(self.runs.rglob(METRICS)):
            recipe = metrics.parent / "recipe.yaml"
            if not recipe.is_file():  # a checkpoint's copy, or not a run yet
                continue
            if metrics not in self.known:
                writer = SummaryWriter(str(self.events / metrics.parent.relative_to(self.runs)))
                writer.add_text("recipe", "```\n" + recipe.read_text(encoding="utf-8") + "```")
                self.known[metrics] = WatchedRun(metrics, writer)
            with suppress(FileNotFoundError):  # it is being replaced
                self.known[metrics].follow()

    def run(self) -> None:
        while not self.over.wait(self.every):
            self.look()

    def stop(self) -> None:
        """End the thread, and the files it writes."""
        self.over.set()
        self.join()
        for run in self.known.values():
            run.writer.close()


def serve(folder: str, port: int = 6006, console: Console | None = None) -> None:
    """Show the runs in a folder until Ctrl-C.

    Raises:
        ValueError: there is no such folder, the port is taken, or TensorBoard is not installed.
    """
    runs, program = Path(folder).expanduser(), board()
    if not runs.is_dir():
        raise ValueError(f"{runs} is no folder; give the one that runs are in, as inlay ui runs")
    with tempfile.TemporaryDirectory() as events:
        follower = Follower(runs.resolve(), Path(events))
        follower.look()
        shown = program.TensorBoard()
        shown.configure(
            ("inlay",), logdir=events, host=HOST, port=port, reload_interval=2.0, window_title=f"inlay: {runs}"
        )
        follower.start()
        try:
            where = shown.launch()
            (console or Console()).print(f"{len(follower.known)} runs at {where} (on this machine alone; Ctrl-C ends)")
            follower.over.wait()
        except program.TensorBoardServerException as error:
            raise ValueError(f"port {port}: {error.msg}") from None
        except KeyboardInterrupt:  # the way it ends
            pass
        finally:
            follower.stop()
