"""Records from a file, a folder, a hub or the built-in slice. What is wrong with one is a line that says where."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from inlay.files.untrusted import DamagedFileError, from_json
from inlay.messages import short
from inlay.models import builtin

Record = dict[str, Any]
VALUES, BYTES = 20_000_000, 4 << 30  # of a Parquet file, which may be a thousandth of that on the disk


def read_records(source: str, split: str | None = None) -> list[Record]:
    """Records from "builtin", a local file or folder, or a hub data set: "owner/name" or "owner/name:config".

    A folder gives all its files of a known kind, with `split` those whose names begin so. A hub is contacted only for
    what cannot be a local path.
    """
    path = builtin.data_path() if source == builtin.MODEL else Path(source).expanduser()
    names = sorted(file.name for file in (path if path.is_dir() else path.parent).glob("*"))
    if path.is_file():
        if split is not None:
            raise _bad(path, f"one file, without a split {split!r}", "a split of a folder or of a hub data set")
        return _read_file(path)
    if path.is_dir():
        chosen = [name for name in names if Path(name).suffix.lower() in READERS and name.startswith(split or "")]
        if not chosen:
            raise _bad(path, short(", ".join(names)), f"{split or ''}* of {KINDS}")
        return [record for name in chosen for record in _read_file(path / name)]
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and path.suffix not in READERS and not path.parent.is_dir():
        return _read_hub(source, split)
    close = difflib.get_close_matches(path.name, names, cutoff=0.5)
    hint = f" (did you mean {', '.join(close)}?)" if close else ""
    raise _bad(path, f"no such file{hint}", f"builtin, {KINDS}, a folder of these, or a hub's owner/name")


def _bad(where: Path | str, found: str, wanted: str) -> DamagedFileError:
    return DamagedFileError(f"{where}: found {found}; accepted: {wanted}")


def _read_hub(source: str, split: str | None) -> list[Record]:
    import datasets

    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # of many kinds, from many libraries; each means that this data set did not come
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"{source}: no local file, and the hub data set did not load: {cause}") from error
    if isinstance(found, datasets.DatasetDict):
        if len(found) > 1 and "train" not in found:
            raise _bad(source, f"the splits {', '.join(map(str, found))}", "the name of one of them")
        found = found["train"] if "train" in found else next(iter(found.values()))
    return found.to_list()


def _read_file(path: Path) -> list[Record]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise _bad(path, f"the suffix {path.suffix!r}", KINDS)
    if path.exists() and not path.is_file():
        raise _bad(path, "a device, a pipe or a folder", "a file")
    try:
        records = reader(path)
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read ({error.strerror or error})".strip()) from error
    if not records:
        raise _bad(path, "no record (empty)", "at least one")
    return records


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _bad(f"{path}, line {line}", f"byte 0x{raw[error.start]:02x}", "text in UTF-8") from error


def _parse(text: str, path: Path, line: int, wanted: str) -> Any:
    try:
        return from_json(text)
    except json.JSONDecodeError as error:
        culprit = short(text.split("\n")[error.lineno - 1])
        raise _bad(f"{path}, line {line + error.lineno - 1}", f"{culprit} ({error.msg})", wanted) from error
    except ValueError as error:  # a number of more digits than are read
        raise _bad(f"{path}, from line {line} on", f"{short(text)} ({error})", wanted) from error


def _read_json(path: Path) -> list[Record]:
    wanted, text = "a list of JSON objects (one object a line is .jsonl)", _read_text(path)
    values = _parse(text, path, 1, wanted) if text.strip() else []
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise _bad(path, short(values), wanted)
    return values


def _read_jsonl(path: Path) -> list[Record]:
    wanted, values = "one JSON object a line", []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            values.append(_parse(line, path, number, wanted))
            if not isinstance(values[-1], dict):
                raise _bad(f"{path}, line {number}", short(line), wanted)
    return values


def _read_table(path: Path) -> list[Record]:
    """CSV or TSV below a header line. In a TSV a quotation mark is a plain character, as in GLUE's files."""
    text = io.StringIO(_read_text(path), newline="")
    is_tsv = path.suffix.lower() == ".tsv"
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(text, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise _bad(f"{path}, line {reader.line_num}", str(error), "fields that are quoted whole or not") from error
    header = rows[0][1] if rows else []
    if len(set(header)) < len(header) or any(re.fullmatch(r"[\s\d.-]*|.{65,}", name, re.DOTALL) for name in header):
        raise _bad(f"{path}, line 1", short(", ".join(header)), "a header of distinct column names")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise _bad(f"{path}, line {line}", f"{len(row)} fields", f"{len(header)}, as in the header")
    return [dict(zip(header, row, strict=True)) for _, row in rows[1:]]


def _read_parquet(path: Path) -> list[Record]:
    try:
        about = pyarrow.parquet.read_metadata(path)
        # Not of columns: what pyarrow trips over in their metadata ends the process.
        values = about.num_rows * about.num_columns
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if values <= VALUES and size <= BYTES:
            return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError, NotImplementedError) as error:
        if isinstance(error, MemoryError):
            raise
        raise _bad(path, short(str(error)), "a Parquet file of plain values") from error
    most = f"at most {VALUES:,} in {BYTES >> 30} GiB (streaming: true reads more)"
    raise _bad(path, f"{values:,} values in {size / 2**30:.1f} GiB", most)


def _read_paragraphs(path: Path) -> list[Record]:
    text = _read_text(path).replace("\r\n", "\n")
    return [{"text": part.strip("\n")} for part in re.split(r"\n\s*\n", text) if part.strip()]


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
}
KINDS = " ".join(READERS)
