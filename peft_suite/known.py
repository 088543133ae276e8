"""What of PEFT's tests is left out, and what is known to fail, each with its reason."""

from __future__ import annotations

import re
from typing import NamedTuple


class Entry(NamedTuple):
    """Tests of which `file::class::name[parameters]` matches the regex `tests`."""

    tests: str
    reason: str


LEFT_OUT: list[Entry] = []
FAILS: list[Entry] = []


def find(table: list[Entry], nodeid: str) -> str | None:
    """The reason of the first entry that matches."""
    return next((entry.reason for entry in table if re.search(entry.tests, nodeid)), None)
