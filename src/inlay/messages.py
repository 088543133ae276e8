"""What a person reads: errors on one line, sizes and durations, suggestions for names, quiet libraries."""

from __future__ import annotations

import difflib
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of an error's line: the name that was meant, or all there are."""
    close = difflib.get_close_matches(name, choices := sorted(choices), 1)
    return f"did you mean {close[0]!r}?" if close else f"it has {', '.join(choices)}"


def duration(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def slug(name: str) -> str:
    """A method's name as a folder's."""
    return re.sub(r"[^\w-]", "-", name)


def short(value: Any) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def loading(what: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Around a library that loads a file: of a damaged one, each raises what it trips over."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise kind(f"{what} cannot be loaded: {first_line(error)}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU's memory, or the machine's, has ended."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    ended = "allocate memory" in said or "not enough memory" in said
    return ended or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    text = repr(error) if isinstance(error, KeyError) else str(error)  # of a key alone nobody would know what it is
    text = " ".join(text.partition("Exception raised from ")[0].split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def quiet() -> None:
    """Keep the libraries' own bars and notices out of a command's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of every product that it rounds
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
