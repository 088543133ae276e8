"""CSV and TSV as pandas, spreadsheets and GLUE write them."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from inlay.data.records import Record, refusal
from inlay.messages import short

Rows = list[tuple[int, list[str]]]  # each with the line it begins at
NUMBER = r"[\s\d.-]*"


def table_records(path: Path, text: str, tsv: bool, tsv_quotes: str, notes: list[str]) -> Iterator[tuple[int, Record]]:
    """Yield the records below a header line, with the line that each begins at."""
    first_line = 1
    if not tsv and re.match(r"sep=.\r?\n", text, re.IGNORECASE):  # Excel's own way to name the delimiter
        delimiter, (_, _, text), first_line = text[4], text.partition("\n"), 2
        rows = _quoted_rows(text, delimiter, path, first_line)
    elif tsv:
        rows = _tsv_rows(text, path, tsv_quotes)
    else:
        delimiter, rows = _csv_rows(text, path)
        if delimiter != ",":
            notes.append(f"{path.name}: columns are separated by {delimiter!r}")
    rows = [(line, row) for line, row in rows if any(row)]  # spreadsheets end on rows of delimiters alone
    if not rows:
        return
    names = table_header(path, rows, notes)
    for line, row in rows[1:]:
        yield line, record_of(path, line, row, names, tsv)


def record_of(path: Path, line: int, row: list[str], names: list[str | None], tsv: bool) -> Record:
    """Return a row as a record, without the columns that have no name.

    Raises:
        ValueError: it has more or fewer fields than the header.
    """
    if len(row) != len(names):
        advice = "" if tsv else " (a field that holds a delimiter or a newline is written in quotes)"
        raise refusal(f"{path}, line {line}", f"{len(row)} fields", f"{len(names)}, as in the header{advice}")
    return {name: cell for name, cell in zip(names, row, strict=True) if name is not None}


def table_header(path: Path, rows: Rows, notes: list[str]) -> list[str | None]:
    """Return the names of the columns; None for one that is left out, as it holds nothing or only counts rows."""
    line, header = rows[0]
    names: list[str | None] = [name.strip() for name in header]
    for place, name in enumerate(names):
        if name == "":
            names[place] = _unnamed(path, rows, place, notes)
    kept = [name for name in names if name is not None]
    cell = next((name for name in kept if re.fullmatch(rf"{NUMBER}|.{{65,}}", name, re.DOTALL)), None)
    if not kept or cell is not None:
        why = "" if cell is None else f"; {short(cell)} is a number or too long for one"
        raise refusal(f"{path}, line {line}", short(", ".join(header)), f"a header of column names{why}")
    if len(set(kept)) < len(kept):
        twice = next(name for name in kept if kept.count(name) > 1)
        raise refusal(
            f"{path}, line {line}", short(", ".join(header)), f"a header of distinct column names, not {twice!r} twice"
        )
    return names


def _unnamed(path: Path, rows: Rows, place: int, notes: list[str]) -> str | None:
    cells = [row[place] for _, row in rows[1:] if place < len(row)]
    if not any(cells):
        return None
    if place == 0 and all(re.fullmatch(r"\d+", cell) for cell in cells):
        notes.append(f"{path.name}: the first column has no name and holds row numbers; it is left out")
        return None
    other = next(cell for cell in cells if cell)
    raise refusal(
        f"{path}, line {rows[0][0]}", f"no name for column {place + 1}, which holds {short(other)}",
        "a header that names every column",
    )  # fmt: skip


def delimiters(header: str) -> list[str]:
    """Return the delimiters that make columns of a header line, the usual one first."""
    line = header[:100_000]  # csv's own limit is 131,072 characters
    return [d for d in ",;\t|" if len(next(csv.reader([line], delimiter=d), [])) > 1] or [","]


def _csv_rows(text: str, path: Path) -> tuple[str, Rows]:
    """Return the delimiter and the rows of a CSV file: commas, unless only another delimiter makes columns of it."""
    line = next(io.StringIO(text, newline=""), "")
    found = delimiters(line)
    tried = [(d, _rows_or_none(text, d, path)) for d in found]
    for delimiter, rows in tried:
        if rows is not None and rows_fit(rows):
            return delimiter, rows
    return found[0], _quoted_rows(text, found[0], path)


def rows_fit(rows: Rows) -> bool:
    """Return whether every row has as many fields as the header."""
    return len({len(row) for _, row in rows if any(row)}) == 1


def _rows_or_none(text: str, delimiter: str, path: Path) -> Rows | None:
    try:
        return _quoted_rows(text, delimiter, path)
    except ValueError:
        return None


def _quoted_rows(text: str, delimiter: str, path: Path, first_line: int = 1) -> Rows:
    """Return rows by RFC 4180: a quoted field may hold delimiters, newlines and doubled quotation marks."""
    return list(parsed_rows(io.StringIO(text, newline=""), delimiter, False, path, first_line))


def _plain_rows(text: str, path: Path) -> Rows:
    """Return rows of a TSV in which a quotation mark is a character like any other, as in GLUE's files."""
    return list(parsed_rows(io.StringIO(text, newline=""), "\t", True, path))


def parsed_rows(
    lines: Iterable[str], delimiter: str, plain: bool, path: Path, first_line: int = 1
) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table, each with the line it begins at; cells are of any length.

    Args:
        lines: of the text, with their ends.
        delimiter: between cells.
        plain: whether a quotation mark is a character like any other.
        path: of the file, for messages.
        first_line: the number of the first of the lines.

    Raises:
        ValueError: a field is quoted in part.
    """
    reader = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL, strict=not plain
    )
    before = 0
    limit = csv.field_size_limit(sys.maxsize)
    try:
        for row in reader:
            yield before + first_line, row
            before = reader.line_num
    except csv.Error as error:
        line = reader.line_num + first_line - 1
        raise refusal(f"{path}, line {line}", str(error), "fields that are quoted whole or not") from error
    finally:
        csv.field_size_limit(limit)


# -- quotation marks in TSV --------------------------------------------------------------------------------------------


def _tsv_rows(text: str, path: Path, quotes: str) -> Rows:
    """Return rows of a TSV, whose quotation marks are RFC 4180's (pandas, spreadsheets) or plain characters (GLUE)."""
    if quotes == "plain" or (quotes == "auto" and '"' not in text):
        return _plain_rows(text, path)
    if quotes == "quoted":
        return _quoted_rows(text, "\t", path)
    plain, quoted = _plain_rows(text, path), _rows_or_none(text, "\t", path)
    if quoted is None or not rows_fit(quoted):
        return plain
    if not rows_fit(plain):
        return quoted
    writer = next((name for name, rule in QUOTED_BY.items() if _written(quoted, rule) == _written(plain, None)), None)
    doubled = any('"' in cell for _, row in quoted for cell in row)
    if writer and (doubled or writer in ("all", "everything") or _mostly_open(plain)):
        return quoted
    if writer is None and '""' not in text:
        return plain
    raise refusal(
        path, "quotation marks that may enclose fields or belong to the text",
        "--tsv-quotes quoted (pandas, spreadsheets) or --tsv-quotes plain (GLUE)",
    )  # fmt: skip


# Who quotes which fields: pandas by default, spreadsheets, and whoever quotes all text but no numbers.
QUOTED_BY: dict[str, Callable[[str], bool]] = {
    "pandas": lambda cell: any(c in cell for c in '"\t\r\n'),
    "spreadsheet": lambda cell: any(c in cell for c in ',"\t\r\n'),
    "all": lambda cell: not re.fullmatch(NUMBER, cell),
    "everything": lambda cell: True,
}


def _written(rows: Rows, quoted: Callable[[str], bool] | None) -> list[str]:
    """Return the lines of a TSV with these rows, in which the fields are quoted that the rule names."""

    def field(cell: str) -> str:
        return '"' + cell.replace('"', '""') + '"' if quoted and quoted(cell) else cell

    return "\n".join("\t".join(map(field, row)) for _, row in rows if row).splitlines()


def _mostly_open(plain: Rows) -> bool:
    """Return whether most lines have an odd number of quotation marks: they are parts of fields that span lines."""
    return 2 * sum("".join(row).count('"') % 2 for _, row in plain) > len(plain)
