"""Format what a person reads: one-line errors, sizes and durations, suggestions for names; silence noisy libraries.

Everything that is printed passes `show_text` or a `Terminal`: nothing in data, names or answers steers a terminal.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:  # help and mistakes in flags would wait seconds for it
    import torch
    from rich.progress import Progress, ProgressColumn

# Control characters but for new line and tab, what turns the direction of writing, line separators, lone surrogates.
STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return `text` with every character that steers a terminal written out, as \\x1b for escape."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Return `text` on one line, with every run of spaces and line breaks a space, and nothing that steers."""
    return printable(" ".join(text.split()))


def show_text(text: str, to_stderr: bool = False) -> None:
    """Print `text` so that nothing in it steers the terminal."""
    print(printable(text), file=sys.stderr if to_stderr else sys.stdout)


def show_json(data: object) -> None:
    """Print `data` as one JSON document, in ASCII, in which nothing steers either."""
    show_text(json.dumps(data, indent=1, default=str))


def show_piece(text: str) -> None:
    """Print a piece of a text that goes on, at once, as `show_text` prints a whole one."""
    print(printable(text), end="", flush=True)


class Terminal(Console):
    """Print to people: nothing that is printed steers the terminal or counts as markup."""

    def __init__(self, **settings: Any) -> None:
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, "width": width, **settings})

    def render_str(self, text: str, **settings: Any) -> Text:
        """Make styled text of a string, as rich does of each that it prints, of cells and titles of tables too."""
        return super().render_str(printable(text), **settings)


def progress_bars(console: Console, time: ProgressColumn) -> Progress:
    """Return bars with a count, a `time` and `now`, of which a narrow screen cuts the text and never the figures.

    rich forgets a step after half a minute, so that slower ones would never show the time left; these remember a day.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=2, max_width=40)),
        BarColumn(None, table_column=Column(ratio=1, max_width=40)),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
        time,
        TextColumn("{task.fields[now]}", markup=False, table_column=Column(no_wrap=True, ratio=5)),
        console=console, disable=not console.is_terminal, speed_estimate_period=86_400.0, expand=True,
    )  # fmt: skip


PACKAGES = {  # what a command needs beside Inlay's own requirements, by the name it is imported under
    "PIL": "pillow",
    "PyNomad": "'inlay[nomad]'",
    "apollo_torch": "apollo-torch",
    "bitsandbytes": "'inlay[quantized]'",
    "fastapi": "'inlay[serve]'",
    "galore_torch": "galore-torch",
    "liger_kernel": "liger-kernel",
    "lm_eval": "'inlay[harness]'",
    "nltk": "'inlay[eval]'",
    "optuna": "'inlay[tune]'",
    "pytorch_optimizer": "pytorch-optimizer",
    "ray": "'inlay[ray]'",
    "rouge_score": "'inlay[eval]'",
    "sacrebleu": "'inlay[eval]'",
    "tensorboard": "'inlay[ui]'",
    "uvicorn": "'inlay[serve]'",
    "xllamacpp": "'inlay[llama]'",
}


def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # what is None in sys.modules
        return False


def check_installed(what: str, *packages: str) -> None:
    """Raise a ValueError, before `what` begins, where one of the `packages` that it needs is missing."""
    for package in packages:
        if not installed(package):
            raise ValueError(f"{what} needs {package}; pip install {PACKAGES[package]}")


class AfterTrainingError(ValueError):
    """Report that a run is trained and saved, and that something after it failed, as its report or its upload."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return the end of an error's line: the choice that `name` probably means, or all `choices`.

    One with other capitals comes first, then several that begin with it, then one with the same letters, two of which
    changed places.
    """
    choices = sorted(choices)
    close = [choice for choice in choices if choice.lower() == name.lower()]
    close = close or difflib.get_close_matches(name, choices) or difflib.get_close_matches(name.lower(), choices)
    longer = [choice for choice in choices if len(name) > 2 and choice.startswith(f"{name}_")]
    if len(longer) > 1 and name.lower() not in map(str.lower, close):
        return f"did you mean one of {', '.join(longer)}?"
    if not close:
        return f"it has {', '.join(choices)}"
    best = next((choice for choice in close if sorted(choice) == sorted(name)), close[0])
    return f"did you mean {best!r}?"


def similar_paths(path: Path) -> str:
    """Return a hint, in brackets, at what lies under a similar name where a `path` is not there; empty for none."""
    names = sorted(file.name for file in path.parent.glob("*"))
    close = difflib.get_close_matches(path.name, names)
    return f" (did you mean {', '.join(str(path.parent / name) for name in close)}?)" if close else ""


def duration(seconds: float) -> str:
    """Format `seconds` as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def gib(size: float) -> str:
    """Format a `size` in bytes as GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as recipes and files write it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def slug(name: str) -> str:
    """Return a method's `name` in a form that can name a folder."""
    return re.sub(r"[^\w-]", "-", name)


def short(value: object) -> str:
    """Return the repr of `value`, shortened to 60 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def loading(what: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn any error of a library that loads `what` into a ValueError of type `kind`, on one line.

    Libraries raise all kinds of exceptions on a damaged file. Running out of memory stays what it is.
    """
    try:
        yield
    except Exception as error:
        if out_of_memory(error) or (isinstance(error, kind) and str(error).startswith(what)):
            raise  # memory, or a line of ours, which says already what it is about
        raise kind(f"{what} cannot be loaded: {first_line(error)}") from error


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that the memory of a GPU or of the machine is exhausted."""
    import torch

    message = str(error) if isinstance(error, RuntimeError) else ""
    exhausted = "allocate memory" in message or "not enough memory" in message
    return exhausted or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def first_line(error: BaseException) -> str:
    """Return the message of an exception on one line, shortened to 400 characters."""
    text = repr(error) if isinstance(error, KeyError) else str(error)  # a bare key would not be recognised as an error
    text = " ".join(text.partition("Exception raised from ")[0].split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def quiet_imports() -> None:
    """Keep out what libraries log while they are imported, on any machine that has them: before they are."""
    # bitsandbytes logs every product that it rounds, too; matplotlib, that it cannot keep a list of fonts.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet() -> None:
    """Keep the progress bars and notices of the libraries out of a command's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own holds a semaphore of the system, which a killed trial would leave

    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", "the experts of this model stay frozen")  # a command says it in its own place
    quiet_imports()
    warnings.formatwarning = lambda message, *_, **__: printable(f"note: {message}\n")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
