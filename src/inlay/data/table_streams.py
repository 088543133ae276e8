"""CSV and TSV a row at a time, for files that memory does not hold.

What `tables` tells by the whole file is told by its beginning here, and every later row is held to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from inlay.data.records import Record, refusal
from inlay.data.tables import Rows, delimiters, parsed_rows, record_of, rows_fit, table_header
from inlay.messages import short

LOOKED_AT = 1000  # rows that tell the delimiter, and whether a column without a name counts rows
Lines = Callable[[], Iterator[tuple[int, str]]]


def streamed_table(
    path: Path, lines: Lines, tsv: bool, tsv_quotes: str, notes: list[str]
) -> Iterator[tuple[int, Record]]:
    """Yield the records below a header line, with the line that each begins at.

    Args:
        path: of the file, for messages.
        lines: reads the file from its beginning: its lines, with their numbers.
        tsv: whether tabs separate columns.
        tsv_quotes: whether quotation marks in a TSV enclose cells or are text; "auto" tells only where there are none.
        notes: what a person should know is added to them.

    Raises:
        ValueError: the file is no table, or its quotation marks need to be told.
    """
    plain = tsv and (tsv_quotes == "plain" or (tsv_quotes == "auto" and _without_quotes(path, lines)))
    candidates = ["\t"] if tsv else delimiters(next(lines(), (1, ""))[1])
    heads = {d: _head(path, lines, d, plain) for d in candidates}
    delimiter = next((d for d, head in heads.items() if head is not None and rows_fit(head)), candidates[0])
    if delimiter != "," and not tsv:
        notes.append(f"{path.name}: columns are separated by {delimiter!r}")
    rows = (numbered for numbered in _rows(path, lines, delimiter, plain) if any(numbered[1]))
    head = list(islice(rows, LOOKED_AT))
    if not head:
        return
    names = table_header(path, head, notes)
    left = [place for place, name in enumerate(names) if name is None]
    for line, row in chain(head[1:], rows):
        record = record_of(path, line, row, names, tsv)
        for place in left:
            if row[place] and not (place == 0 and re.fullmatch(r"\d+", row[place])):
                wanted = "a header that names every column"
                raise refusal(f"{path}, line {line}", f"{short(row[place])} in a column without a name", wanted)
        yield line, record


def _without_quotes(path: Path, lines: Lines) -> bool:
    if any('"' in line for _, line in lines()):
        choice = "--tsv-quotes quoted (pandas, spreadsheets) or --tsv-quotes plain (GLUE) where data is streamed"
        raise refusal(path, "quotation marks that may enclose fields or belong to the text", choice)
    return True


def _head(path: Path, lines: Lines, delimiter: str, plain: bool) -> Rows | None:
    try:
        return list(islice(_rows(path, lines, delimiter, plain), LOOKED_AT))
    except ValueError:
        return None


def _rows(path: Path, lines: Lines, delimiter: str, plain: bool) -> Iterator[tuple[int, list[str]]]:
    return parsed_rows((f"{line}\n" for _, line in lines()), delimiter, plain, path)
