"""The standard streams of a command: one that is closed, full or read no longer never ends the work behind it."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO, cast

from inlay.messages import show_text


class Steady(io.FileIO):
    """Write to a standard stream; once that has failed, to nothing, and keep the reason.

    The stream itself is redirected, so that it is the same for libraries and for processes that are started.
    """

    failure: OSError | None = None

    def write(self, data) -> int:
        """Write `data`, or pretend to."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return memoryview(data).nbytes


class Streams:
    """Replace the standard streams of this process, unless somebody has done so: a test, or a notebook."""

    def __init__(self) -> None:
        self.steady: list[Steady] = []
        open_closed()
        if sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__:
            sys.stdout, sys.stderr = (self.made_steady(cast(io.TextIOWrapper, s)) for s in (sys.stdout, sys.stderr))

    def made_steady(self, stream: io.TextIOWrapper) -> TextIO:
        """Return a stream to the same file, which writes out what its encoding lacks, as \\xe9."""
        file = Steady(stream.fileno(), "w", closefd=False)
        self.steady.append(file)
        at_once = bool(stream.write_through)  # python -u
        return io.TextIOWrapper(
            cast(Any, file if at_once else io.BufferedWriter(file)), stream.encoding, errors="backslashreplace",
            line_buffering=bool(stream.line_buffering), write_through=at_once,
        )  # fmt: skip

    def exit_code(self, code: int) -> int:
        """Return the code to end with in place of `code`, after a line where the output could not be written.

        Whoever reads no longer, as `head`, wants no more, and that is not an error.
        """
        if not self.steady:
            return code
        sys.stdout.flush()
        failure = self.steady[0].failure
        if failure is not None and failure.errno != errno.EPIPE:
            show_text(
                f"inlay: the output cannot be written ({failure.strerror}), so part of it is lost", to_stderr=True
            )
            code = code or 3
        sys.stderr.flush()
        return code


def open_closed() -> None:
    """Open what was closed of the standard streams to nothing, or the next file would take its place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the least free number
        if vars(sys)[name] is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (it stays open)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
