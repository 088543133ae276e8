"""Show running and finished runs in TensorBoard, on this machine only (`inlay ui`).

Runs write metrics.jsonl in any case. A thread follows those files and passes new rows to TensorBoard, which overlays
the runs; TensorBoard's own files are deleted with the process. A folder of runs may be somebody else's: links are not
followed, what cannot be read is said beside its run, and a page of another name (of a site that has its own name point
here) gets no answer.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from rich.console import Console

from inlay.files.atomic import find_again
from inlay.files.untrusted import user_path
from inlay.messages import Terminal, check_installed, first_line, printable, show_text
from inlay.training.checkpoints import METRICS

HOST = "127.0.0.1"
OWN_NAMES = (HOST, "localhost")
MOST = 1 << 24  # bytes that are read of a file at a time
NAMES = {  # TensorBoard shows the groups in the order of their names: the loss has to be the first
    "loss": "loss/training",
    "eval_loss": "loss/held out",
    "penalty": "loss/penalty",
    "mean_token_accuracy": "token accuracy/training",
    "eval_mean_token_accuracy": "token accuracy/held out",
    "learning_rate": "optimiser/learning rate",
    "grad_norm": "optimiser/gradient norm",
    "memory": "memory/peak (bytes)",
    "tokens": "size/tokens",
    "trained": "size/trained numbers",
}


def board() -> ModuleType:
    """Import TensorBoard's program.

    Raises:
        ValueError: it is not installed.
    """
    check_installed("inlay ui", "tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its dependencies
        from tensorboard import program

    return program


def own_name_only(app: WSGIApplication) -> WSGIApplication:
    """Return a WSGI application that answers as `app` does, but only to the names and the port of this machine."""

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        own = [f"{name}:{environ['SERVER_PORT']}" for name in OWN_NAMES]
        if environ.get("HTTP_HOST", "").lower() in own:
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [f"this page answers to {' and '.join(own)} alone\n".encode()]

    return guarded


def read_part(path: Path, start: int = 0) -> tuple[bytes, os.stat_result]:
    """Return at most `MOST` bytes of a plain file from `start` on, and its status.

    Raises:
        OSError: it cannot be read, is a link, or is no plain file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no plain file")
        file.seek(start)
        return file.read(MOST), status


@dataclass
class WatchedRun:
    """Follow a metrics.jsonl from where it was last read."""

    metrics: Path
    writer: Any
    file: int = 0  # its inode: a resumed run writes its metrics into a new file
    read: int = 0
    seconds: float = 0.0
    error: str = ""

    def follow(self) -> None:
        """Pass on the complete lines that are new.

        Raises:
            OSError: the file cannot be read.
        """
        part, status = read_part(self.metrics, self.read)
        if status.st_ino != self.file or status.st_size < self.read:
            self.file = status.st_ino
            self.read = 0
            self.seconds = 0.0
            part, status = read_part(self.metrics)
        text, end, rest = part.rpartition(b"\n")
        self.read += len(part) if len(rest) == MOST else len(text) + len(end)  # a line without end is none of a run's
        started = (self.metrics.parent / "recipe.yaml").lstat().st_mtime
        for line in text.splitlines():
            try:
                row = json.loads(line)
                step, self.seconds = row["step"], float(row.get("seconds", self.seconds))
                for name in row.keys() & NAMES.keys():
                    self.writer.add_scalar(NAMES[name], float(row[name]), step, walltime=started + self.seconds)
            except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
                show_text(f"note: {self.metrics}: {line[:80]!r} is skipped: {error!r:.200}", to_stderr=True)
        self.writer.flush()

    def report(self, error: Exception) -> None:
        """Show beside the run, once, why it cannot be read."""
        if str(error) != self.error:
            self.error = str(error)
            show_text(f"note: {self.metrics.parent} cannot be read: {first_line(error)}", to_stderr=True)
            self.writer.add_text("error", printable(self.error))
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
            if not os.path.lexists(recipe):  # a checkpoint's copy, or not a run yet
                continue
            if metrics not in self.known:
                writer = SummaryWriter(str(self.events / metrics.parent.relative_to(self.runs)))
                run = self.known[metrics] = WatchedRun(metrics, writer)
                try:
                    text = read_part(recipe)[0].decode("utf-8")
                    writer.add_text("recipe", f"```\n{printable(text)}```")
                except (OSError, ValueError) as error:
                    run.report(error)
            try:
                self.known[metrics].follow()
            except FileNotFoundError:  # it is being replaced
                pass
            except OSError as error:
                self.known[metrics].report(error)

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
    runs = find_again(user_path(folder))
    for old in runs.rglob(".?*.????????.old"):  # runs that were to be replaced when a process died
        find_again(old.parent / old.name[1 : -len(".????????.old")])
    program = board()
    if not runs.is_dir():
        raise ValueError(f"{runs} is not a folder; give the one that holds the runs, as in inlay ui runs")
    if not 0 <= port < 2**16:
        raise ValueError(f"port {port} is none of 0 to 65535; --port 0 takes any that is free")
    with tempfile.TemporaryDirectory() as events:
        follower = Follower(runs.resolve(), Path(events))
        follower.look()
        server = program.TensorBoard(server_class=lambda app, flags: program.WerkzeugServer(own_name_only(app), flags))
        server.configure(
            ("inlay",), logdir=events, host=HOST, port=port, reload_interval=2.0, window_title=f"inlay: {runs}"
        )
        follower.start()
        try:
            address = server.launch()
            (console or Terminal()).print(f"{len(follower.known)} runs at {address} (this machine only; Ctrl-C ends)")
            follower.over.wait()
        except program.TensorBoardServerException as error:
            raise ValueError(f"port {port}: {error.msg}") from None
        except KeyboardInterrupt:  # the normal way to end
            pass
        finally:
            follower.stop()
