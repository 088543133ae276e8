"""Show running and finished runs in TensorBoard, on this machine only (`inlay ui`).

Runs write metrics.jsonl in any case. A thread follows those files and passes new rows to TensorBoard, which overlays
the runs; TensorBoard's own files are deleted with the process.
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

from inlay.files.atomic import find_again
from inlay.files.untrusted import read_regular, regular_file
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
    """Import TensorBoard's program.

    Raises:
        ValueError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its dependencies
            from tensorboard import program
    except ImportError:
        raise ValueError("inlay ui needs TensorBoard; pip install 'inlay[ui]'") from None
    return program


@dataclass
class WatchedRun:
    """Follow a metrics.jsonl from where it was last read."""

    metrics: Path
    writer: Any
    file: int = 0  # its inode: a resumed run writes its metrics into a new file
    read: int = 0
    seconds: float = 0.0

    def follow(self) -> None:
        """Pass on the complete lines that are new."""
        status = self.metrics.stat()
        if status.st_ino != self.file or status.st_size < self.read:
            self.file = status.st_ino
            self.read = 0
            self.seconds = 0.0
        with regular_file(self.metrics).open("rb") as file:
            file.seek(self.read)
            text, end, _ = file.read().rpartition(b"\n")
        self.read += len(text) + len(end)
        started = (self.metrics.parent / "recipe.yaml").stat().st_mtime
        for line in text.splitlines():
            try:
                row = json.loads(line)
                step, self.seconds = row["step"], float(row.get("seconds", self.seconds))
                for name in row.keys() & NAMES.keys():
                    self.writer.add_scalar(NAMES[name], float(row[name]), step, walltime=started + self.seconds)
            except (ValueError, TypeError, KeyError) as error:
                print(f"note: {self.metrics}: {line[:80]!r} is skipped: {error!r}", file=sys.stderr)
        self.writer.flush()


class Follower(threading.Thread):
    """Follow every run under a folder, also those that begin later, once in `every` seconds."""

    def __init__(self, runs: Path, events: Path, every: float = 2.0) -> None:
        super().__init__(daemon=True)
        self.runs = runs
        self.events = events
        self.every = every
        self.known: dict[Path, WatchedRun] = {}
        self.over = threading.Event()

    def look(self) -> None:
        """Read what is new in all runs."""
        from torch.utils.tensorboard import SummaryWriter

        for metrics in sorted(self.runs.rglob(METRICS)):
            recipe = metrics.parent / "recipe.yaml"
            if not recipe.is_file() or not metrics.is_file():  # a checkpoint's copy, not a run yet, or a pipe
                continue
            if metrics not in self.known:
                writer = SummaryWriter(str(self.events / metrics.parent.relative_to(self.runs)))
                writer.add_text("recipe", "```\n" + read_regular(recipe) + "```")
                self.known[metrics] = WatchedRun(metrics, writer)
            with suppress(FileNotFoundError):  # it is being replaced
                self.known[metrics].follow()

    def run(self) -> None:
        while not self.over.wait(self.every):
            self.look()

    def stop(self) -> None:
        """End the thread and close the files it writes."""
        self.over.set()
        self.join()
        for run in self.known.values():
            run.writer.close()


def serve(folder: str, port: int = 6006, console: Console | None = None) -> None:
    """Show the runs in a folder until Ctrl-C.

    Raises:
        ValueError: there is no such folder, the port is taken, or TensorBoard is not installed.
    """
    runs = find_again(Path(folder).expanduser())
    for old in runs.rglob(".?*.????????.old"):  # runs that were to be replaced when a process died
        find_again(old.parent / old.name[1 : -len(".????????.old")])
    program = board()
    if not runs.is_dir():
        raise ValueError(f"{runs} is not a folder; give the one that holds the runs, as in inlay ui runs")
    with tempfile.TemporaryDirectory() as events:
        follower = Follower(runs.resolve(), Path(events))
        follower.look()
        server = program.TensorBoard()
        server.configure(
            ("inlay",), logdir=events, host=HOST, port=port, reload_interval=2.0, window_title=f"inlay: {runs}"
        )
        follower.start()
        try:
            address = server.launch()
            (console or Console()).print(f"{len(follower.known)} runs at {address} (this machine only; Ctrl-C ends)")
            follower.over.wait()
        except program.TensorBoardServerException as error:
            raise ValueError(f"port {port}: {error.msg}") from None
        except KeyboardInterrupt:  # the normal way to end
            pass
        finally:
            follower.stop()
