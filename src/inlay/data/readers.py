"""Records from a file, a folder, a hub or the built-in slice. What is wrong with one is a line that says where."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from inlay.data.columnar import columnar_records
from inlay.data.folders import Parts, folder_parts, kind_of, short_list
from inlay.data.json_files import is_json_object, json_records
from inlay.data.records import Numbered, Record, Records, refusal
from inlay.data.table_streams import streamed_table
from inlay.data.tables import table_records
from inlay.files.untrusted import DamagedFileError, regular_file, user_path
from inlay.messages import gib, similar_paths
from inlay.models import builtin
from inlay.models.hub import offline, why_offline

LEAST = 256 << 20  # bytes of an unpacked file, times its size packed; of one line
FACTOR = 100
LINE = 1 << 30
UNPACK = {".zip": "unzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "zstd -d", ".tar": "tar -xf", ".tgz": "tar -xzf"}
BEGINNINGS = {  # of files that are no text, whatever their names say; what to do with each
    b"\x1f\x8b": "a gzip file, which is named so: mv {name} {name}.gz",
    b"PK\x03\x04": "a zip file or a workbook: unzip it, or save it as CSV",
    b"PAR1": "a Parquet file, which is named so: mv {name} {stem}.parquet",
    b"ARROW1": "an Arrow file, which is named so: mv {name} {stem}.arrow",
    b"BZh": "a bzip2 file: bunzip2 -c {name} > {stem}",
    b"\xfd7zXZ": "an xz file: unxz -c {name} > {stem}",
    b"\x28\xb5\x2f\xfd": "a zstd file: zstd -dc {name} > {stem}",
    b"\xd0\xcf\x11\xe0": "an old workbook: save it as CSV",
}


@dataclass
class Reading:
    """Hold how files are read, and what was noticed; `unit` is what the numbers of the last file's records count."""

    encoding: str = "utf-8"
    tsv_quotes: str = "auto"
    notes: list[str] = field(default_factory=list)
    unit: str = "line"


def read_records(
    source: str, split: str | None = None, reading: Reading | None = None, one_split: bool = False
) -> Records:
    """Return records from "builtin", a local file or folder, or a hub data set: "owner/name" or "owner/name:config".

    Of a source with several splits these are the ones to train on, unless `split` names others.

    Raises:
        ValueError: as `read_splits`; with `one_split`, a folder has several, of which the first may be trained on.
    """
    path = user_path(source)
    if one_split and path.is_dir() and len(files := folder_parts(path, None, KINDS).by_split()) > 1:
        listed = ", ".join(f"{split} ({short_list(names)})" for split, names in files.items())
        raise refusal(path, f"the splits {listed}", f"one of their files, as {path / next(iter(files.values()))[0]}")
    return read_splits(source, split, reading)["train"]


def read_splits(source: str, split: str | None = None, reading: Reading | None = None) -> dict[str, Records]:
    """Return the records to train on, as "train", and those that the source holds out itself, as "validation".

    `split` names one part of a folder or a hub data set, which is then all that is read. A hub is contacted only for
    what cannot be a local path.

    Raises:
        ValueError: there is no such source or split, or a file of it cannot be read.
    """
    reading = reading or Reading()
    path = builtin.data_path() if source == builtin.MODEL else regular_file(user_path(source))
    if path.is_dir():
        return _read_folder(folder_parts(path, split, KINDS), reading)
    if path.is_file():
        if split is not None:
            raise refusal(path, f"one file, without a split {split!r}", "a split of a folder or of a hub data set")
        return {"train": read_files([path], path.parent, reading)}
    if (
        re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source)
        and kind_of(path) not in READERS
        and not path.parent.is_dir()
    ):
        return _read_hub(source, split, reading)
    raise refusal(
        path, f"no such file{similar_paths(path)}", f"builtin, {KINDS}, a folder of these, or a hub's owner/name"
    )


def _read_folder(parts: Parts, reading: Reading) -> dict[str, Records]:
    reading.notes += parts.notes
    return {name: read_files(files, parts.folder, reading) for name, files in parts.files.items()}


def read_files(files: list[Path], folder: Path, reading: Reading) -> Records:
    """Return the records of some files of a folder, one file after the other."""
    records = Records()
    for path in files:
        before = len(records)
        records.add_file(str(path.relative_to(folder)), file_records(path, reading))
        records.name_unit(reading.unit)
        if len(records) == before:
            raise refusal(path, "no row of data in it", "at least one")
    return records


def file_records(path: Path, reading: Reading, whole: bool = True) -> Iterator[tuple[int, Record]]:
    """Yield the records of one file with their lines or rows; unless `whole`, without ever holding the file in memory.

    Raises:
        ValueError: the file cannot be read, or is not what its name says.
    """
    reader = READERS.get(kind_of(path))
    if reader is None:
        command = UNPACK.get(path.suffix.lower())
        advice = f" ({command} {path.name} unpacks it)" if command else ""
        if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
            advice = " (save the sheet as CSV)"
        raise refusal(path, f"the suffix {path.suffix!r}" if path.suffix else "a name without a suffix", KINDS + advice)
    if path.exists() and not path.is_file():
        raise refusal(path, "a device, a pipe or a folder", "a file")
    try:
        yield from reader(path, reading, whole)
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read ({error.strerror or error})".strip()) from error


def _read_hub(source: str, split: str | None, reading: Reading) -> dict[str, Records]:
    import datasets.config

    name, _, config = source.partition(":")
    datasets.config.HF_HUB_OFFLINE = unreachable = offline()
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # of many kinds, from many libraries; each means that this data set did not come
        cause = " ".join(str(error).split())[:200]
        if unreachable and isinstance(error, ConnectionError):
            cause = why_offline()
        raise ValueError(f"{source}: no local file, and the hub data set did not load: {cause}") from error
    parts: dict[str, Any] = {"train": found}
    if isinstance(found, datasets.DatasetDict):
        if len(found) > 1 and "train" not in found:
            raise refusal(source, f"the splits {', '.join(map(str, found))}", "the name of one of them with --split")
        parts = {"train": found["train"] if "train" in found else next(iter(found.values()))}
        if "validation" in found and "train" in found:
            parts["validation"] = found["validation"]
            reading.notes.append(f"{source}: train is trained on, validation is held out")
    read = {name: Records() for name in parts}
    for part, records in read.items():
        records.add_file(f"{source}, {part}", enumerate(parts[part].to_list(), start=1))
        records.name_unit("row")
    return read


# -- one file ----------------------------------------------------------------------------------------------------------


def open_bytes(path: Path) -> IO[bytes]:
    """Return a file's bytes, unpacked where it ends in .gz, up to a bound on what comes out."""
    if path.suffix.lower() != ".gz":
        return regular_file(path).open("rb")
    return io.BufferedReader(Unpacked(path), 1 << 16)


class Unpacked(io.RawIOBase):
    """Read a gzip file, and refuse one where a few bytes unpack without end."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.most = max(LEAST, FACTOR * path.stat().st_size)
        self.source = gzip.open(regular_file(path), "rb")  # noqa: SIM115 - closed with this object

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            part = self.source.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise DamagedFileError(f"{self.path}: cannot be unpacked ({error})") from error
        self.count += len(part)
        if self.count > self.most:
            wanted = f"at most {FACTOR} times the file, or {gib(LEAST)} (gunzip it first)"
            raise refusal(self.path, f"more than {gib(self.most)} once unpacked", wanted)
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self.source.close()
        super().close()


def _open_text(path: Path) -> IO[bytes]:
    """Open the bytes of what has to be a text file.

    Raises:
        ValueError: it is a file of another kind, by how it begins.
    """
    file = open_bytes(path)
    beginning = cast(io.BufferedReader, file).peek(8)
    kind = next((kind for mark, kind in BEGINNINGS.items() if beginning.startswith(mark)), None)
    if kind is not None:
        file.close()
        if path.suffix.lower() == ".gz":
            kind = re.split("[:,]", kind)[0] + " within it: gunzip -c {name} > {stem}"
        raise refusal(path, kind.format(name=path.name, stem=path.stem), f"text in a {kind_of(path)} file")
    return file


def text_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, one at a time; a mark of the byte order is left out."""
    with _open_text(path) as file:
        if codecs.lookup(encoding).name != "utf-8":
            for number, line in enumerate(_decoded(path, file.read(), encoding).split("\n"), start=1):
                yield number, line
            return
        number = 0
        while raw := file.readline(LINE + 1):
            number += 1
            if len(raw) > LINE:
                raise refusal(f"{path}, line {number}", f"more than {gib(LINE)}", "shorter lines")
            yield number, _decoded(path, raw.removesuffix(b"\n"), "utf-8-sig" if number == 1 else encoding, number)


def read_text(path: Path, encoding: str) -> str:
    """Return a text file as a whole."""
    with _open_text(path) as file:
        return _decoded(path, file.read(), "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)


def _decoded(path: Path, raw: bytes, encoding: str, line: int = 1) -> str:
    try:
        text = raw.decode(encoding).removeprefix("\ufeff")
        if line == 1 and (wide := _without_mark(raw)) and text.count("\0") > len(text) // 4:
            raise refusal(path, f"a zero byte beside every letter, as {wide.upper()} has", f"--encoding {wide}")
        return text
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        line += raw.count(b"\n", 0, start)
        named = encoding.removesuffix("-sig").upper()
        other = next((one for one in _guesses(raw) if one != codecs.lookup(encoding).name), "the name of its encoding")
        found = f"byte 0x{raw[start]:02x}" if raw else "nothing"
        raise refusal(f"{path}, line {line}", found, f"text in {named}, or --encoding {other}") from error


def _guesses(raw: bytes) -> Iterator[str]:
    """Yield the encodings that a text which is no UTF-8 may have: Excel's Unicode text, and Windows' western one."""
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        yield "utf-32"
    elif raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        yield "utf-16"
    for name in ("cp1252", "latin-1"):
        try:
            raw.decode(name)
            yield name
        except UnicodeDecodeError:
            pass


def _without_mark(raw: bytes) -> str | None:
    """Return the UTF-16 that a text without a byte-order mark may be in; None where zero bytes stand elsewhere."""
    pairs = raw[: min(len(raw), 1000) // 2 * 2]
    low, high = pairs[1::2].count(0), pairs[::2].count(0)
    if 2 * max(low, high) <= len(pairs) // 2:
        return None
    return "utf-16-le" if low > high else "utf-16-be"


def _json(path: Path, reading: Reading, whole: bool) -> Numbered:
    lines = text_lines(path, reading.encoding)
    reading.unit, records = json_records(path, lines, kind_of(path) == ".jsonl", reading.notes, whole)
    return records


def _table(path: Path, reading: Reading, whole: bool) -> Numbered:
    reading.unit = "line"
    if not whole:
        lines = partial(text_lines, path, reading.encoding)
        return streamed_table(path, lines, kind_of(path) == ".tsv", reading.tsv_quotes, reading.notes)
    text = read_text(path, reading.encoding)
    return table_records(path, text, kind_of(path) == ".tsv", reading.tsv_quotes, reading.notes)


def _columnar(path: Path, reading: Reading, whole: bool) -> Numbered:
    reading.unit = "row"
    return columnar_records(path, whole)


def _paragraphs(path: Path, reading: Reading, whole: bool) -> Numbered:
    text, reading.unit = read_text(path, reading.encoding).replace("\r\n", "\n"), "line"
    if is_json_object(text.strip().partition("\n")[0]):
        raise refusal(path, "JSON", f"paragraphs of text, or JSON in a .jsonl file (mv {path.name} {path.stem}.jsonl)")
    line = 1
    for part in re.split(r"(\n\s*\n)", text):
        if part.strip():
            yield line + (len(part) - len(part.lstrip("\n"))), {"text": part.strip("\n")}
        line += part.count("\n")


READERS: dict[str, Callable[[Path, Reading, bool], Numbered]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _columnar,
    ".txt": _paragraphs,
    ".arrow": _columnar,
}
KINDS = " ".join(READERS)
