"""Format what a person reads: one-line errors, sizes and durations, suggestions for names; silence noisy libraries."""

from __future__ import annotations

import difflib
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class AfterTrainingError(ValueError):
    """Report that a run is trained and saved, and that something after it failed, as its report or its upload."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return the end of an error's line: the choice that `name` probably means, or all `choices`."""
    close = difflib.get_close_matches(name, choices := sorted(choices), 1)
    return f"did you mean {close[0]!r}?" if close else f"it has {', '.join(choices)}"


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
        if out_of_memory(error):
            raise
        raise kind(f"{what} cannot be loaded: {first_line(error)}") from error


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that the memory of a GPU or of the machine is exhausted."""
    message = str(error) if isinstance(error, RuntimeError) else ""
    exhausted = "allocate memory" in message or "not enough memory" in message
    return exhausted or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def first_line(error: BaseException) -> str:
    """Return the message of an exception on one line, shortened to 400 characters."""
    text = repr(error) if isinstance(error, KeyError) else str(error)  # a bare key would not be recognised as an error
    text = " ".join(text.partition("Exception raised from ")[0].split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def quiet() -> None:
    """Keep the progress bars and notices of the libraries out of a command's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs every product that it rounds
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
