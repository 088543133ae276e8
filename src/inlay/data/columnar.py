"""Parquet and Arrow files, decoded in batches and never beyond a bound: a kilobyte of them can stand for gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from pyarrow import types

from inlay.data.parquet_footer import chunk_sizes
from inlay.data.records import Record, refusal
from inlay.files.untrusted import DamagedFileError, regular_file
from inlay.messages import gib, short

_compute: Any = pyarrow.compute  # its functions are made when it is imported

WHOLE = 4 << 30  # decoded bytes of a file that is held in memory
LEAST, FACTOR = 256 << 20, 1000  # and of any file: so many times its size, but at least the first
VALUES = 20_000_000  # of a file that is held in memory; each becomes a Python object
ROWS, BATCH = 16_384, 64 << 20  # of a batch, at most: rows, and about so many bytes
SLICE = 16 << 20  # decoded bytes that are made Python objects at once
Sized = tuple[pyarrow.RecordBatch, int]
TROUBLE = (pyarrow.ArrowException, ValueError, OverflowError, KeyError, NotImplementedError, TypeError)


def columnar_records(path: Path, whole: bool = True) -> Iterator[tuple[int, Record]]:
    """Yield the records of a Parquet or Arrow file, with their numbers.

    With `whole` nothing is handed on before all of the file is known to fit; else one batch is decoded at a time.

    Raises:
        ValueError: the file is damaged, or holds more than is decoded.
    """
    is_parquet = path.suffix.lower() == ".parquet"
    batches = _parquet_batches(path, whole) if is_parquet else _arrow_batches(path)
    bounded = _bounded(path, batches, whole)
    number = 0
    for batch, size in list(bounded) if whole else bounded:
        for record in _records(path, batch, size):
            number += 1
            yield number, record


def _bounded(path: Path, batches: Iterator[pyarrow.RecordBatch], whole: bool) -> Iterator[Sized]:
    """Yield the batches of a file with their decoded sizes, until their size as Python objects passes its bound."""
    size = 0
    values = 0
    most = max(LEAST, FACTOR * path.stat().st_size)
    kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)
            own = sum(map(decoded_size, batch.columns))
        except TROUBLE as error:
            if isinstance(error, (MemoryError, DamagedFileError)):
                raise
            raise refusal(path, short(str(error)), f"a{'n' * (kind == 'Arrow')} {kind} file of plain values") from error
        size, values = size + own, values + batch.num_rows * batch.num_columns
        if size > most:
            raise _too_large(path, size)
        if whole and (size > WHOLE or values > VALUES):
            raise refusal(
                path, f"{values:,} values in {gib(size)}",
                f"at most {VALUES:,} in {gib(WHOLE)} (--streaming reads more)",
            )  # fmt: skip
        yield batch, own


def _too_large(path: Path, size: float) -> Exception:
    return refusal(path, f"{gib(size)} and more once decoded", f"at most {FACTOR} times the file, or {gib(LEAST)}")


def _parquet_batches(path: Path, whole: bool) -> Iterator[pyarrow.RecordBatch]:
    """Yield batches of rows, text as dictionaries: a value that many rows share is then decoded once."""
    allowed = max(LEAST, FACTOR * path.stat().st_size)
    chunks = list(chunk_sizes(path))
    for chunk in chunks:
        if 8 * chunk.values + chunk.size > allowed:
            raise _too_large(path, 8 * chunk.values + chunk.size)
    with pyarrow.parquet.ParquetFile(path) as file:
        leaves = [file.schema.column(i) for i in range(len(file.schema))]
        if whole and file.metadata.num_rows * len(leaves) > VALUES:
            count = file.metadata.num_rows * len(leaves)
            raise refusal(path, f"{count:,} values", f"at most {VALUES:,} in {gib(WHOLE)} (--streaming reads more)")
        average = sum(chunk.size for chunk in chunks) // max(1, file.metadata.num_rows)
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
        yield from file.iter_batches(max(1, min(ROWS, BATCH // max(1, average))), use_threads=False)


def _arrow_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Yield batches of an Arrow file: the stream that `datasets` saves, or the format with a footer."""
    with pyarrow.memory_map(str(regular_file(path))) as source:
        is_stream = source.read(6) != b"ARROW1"
        source.seek(0)
        if is_stream:
            yield from pyarrow.ipc.open_stream(source)
        else:
            file = pyarrow.ipc.open_file(source)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))


def decoded_size(values: pyarrow.Array) -> int:
    """Return roughly how many bytes an array takes once every row is a value of its own.

    Raises:
        NotImplementedError: its type lets rows share what they hold in ways that are not counted here.
    """
    if isinstance(values, pyarrow.ExtensionArray):
        return decoded_size(values.storage)
    kind, own = values.type, 8 * len(values)
    if types.is_dictionary(kind):
        return own + _total(_sizes(values.dictionary).take(values.indices))
    if types.is_struct(kind):
        return own + sum(map(decoded_size, values.flatten()))
    if types.is_map(kind):
        return own + decoded_size(values.keys) + decoded_size(values.items)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return own + decoded_size(values.flatten())
    if _is_text(kind):
        return own + _total(_compute.binary_length(values))
    if types.is_null(kind) or types.is_primitive(kind) or types.is_decimal(kind) or types.is_fixed_size_binary(kind):
        return max(values.nbytes, own)
    raise NotImplementedError(f"values of type {kind}")


def _sizes(dictionary: pyarrow.Array) -> pyarrow.Array:
    """Return the decoded size of each value of a dictionary."""
    if _is_text(dictionary.type):
        return _compute.binary_length(dictionary)
    return pyarrow.array([decoded_size(dictionary.slice(i, 1)) for i in range(len(dictionary))], pyarrow.int64())


def _is_text(kind: pyarrow.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _total(lengths: pyarrow.Array) -> int:
    return _compute.sum(lengths.cast(pyarrow.int64())).as_py() or 0


def _records(path: Path, batch: pyarrow.RecordBatch, size: int) -> Iterator[Record]:
    """Yield the rows of a batch, so few at a time that they take little memory."""
    step = max(1, min(batch.num_rows, batch.num_rows * SLICE // max(1, size)))
    for start in range(0, batch.num_rows, step):
        try:
            yield from batch.slice(start, step).to_pylist()
        except TROUBLE as error:
            raise refusal(path, short(str(error)), "a file of plain values") from error
