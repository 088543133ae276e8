"""What every reader hands on: records, where each one stood, and how a faulty file is described."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inlay.files.untrusted import DamagedFileError

Record = dict[str, Any]
Numbered = Iterable[tuple[int, Record]]  # a record and the line (or row) it begins at


class Records(list[Record]):
    """Hold records of one source, and the file and the line that each was read from."""

    def __init__(self) -> None:
        super().__init__()
        self._starts: list[int] = []
        self._files: list[tuple[str, str, array]] = []

    def add_file(self, name: str, numbered: Numbered) -> None:
        """Append the records of one file."""
        numbers = array("Q")
        self._starts.append(len(self))
        self._files.append((name, "line", numbers))
        for number, record in numbered:
            numbers.append(number)
            self.append(record)

    def name_unit(self, unit: str) -> None:
        """Say what the numbers of the last file count: lines, or rows."""
        name, _, numbers = self._files[-1]
        self._files[-1] = (name, unit, numbers)

    def place(self, index: int) -> str:
        """Return where the record at `index` stands, as in "train.jsonl, line 4"."""
        if not self._starts:
            return f"row {index + 1}"
        file = bisect_right(self._starts, index) - 1
        name, unit, numbers = self._files[file]
        return f"{name}, {unit} {numbers[index - self._starts[file]]}"


def place_of(records: list[Record], index: int) -> str:
    """Return where a record stands in its file, or its number where no file is known."""
    return records.place(index) if isinstance(records, Records) else f"row {index + 1}"


def refusal(where: Path | str, found: str, wanted: str) -> DamagedFileError:
    """Return the error for a file that cannot be read: what was found in it, and what is accepted."""
    return DamagedFileError(f"{where}: found {found}; accepted: {wanted}")
