"""What the footer and the page headers of a Parquet file claim to hold, read without decoding anything.

pyarrow tells as much only through calls that end the process on a damaged file. Footers and headers are structs in
Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.data.records import refusal
from inlay.files.untrusted import regular_file

DEPTH = 32  # of structs in structs


@dataclass(frozen=True)
class ChunkSize:
    """Hold how many values a column of one row group has, and their bytes once decompressed."""

    values: int
    size: int


def chunk_sizes(path: Path) -> Iterator[ChunkSize]:
    """Yield the sizes of every column chunk of a Parquet file.

    Raises:
        ValueError: the file is no Parquet, or its footer or a page header cannot be read.
    """
    try:
        with regular_file(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[-4:] != b"PAR1":
                raise ValueError("no footer")
            footer = Thrift(data, len(data) - 8 - int.from_bytes(data[-8:-4], "little")).struct()
            for group in footer.get(4, []):
                for column in group.get(1, []):
                    if 3 in column:
                        yield _chunk(data, column[3])
    except (ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
        raise refusal(path, f"what is none ({error})", "a Parquet file") from error


def _chunk(data: mmap.mmap, about: dict[int, Any]) -> ChunkSize:
    """Follow the headers of a chunk's pages: what they claim is what would be decoded."""
    claimed = about[5]
    values = 0
    size = 0
    starts = [about[field] for field in (9, 11) if about.get(field, 0) > 0]
    place = min(starts)
    end = place + about[7]
    while values < claimed and place < end:
        reader = Thrift(data, place)
        header = reader.struct()
        size += max(0, header[2])
        page = header.get(5) or header.get(8)
        values += page[1] if page else 0
        if header[3] < 0 or (page and page[1] < 0):
            raise ValueError("a page of negative size")
        place = reader.place + header[3]
    return ChunkSize(max(values, claimed), size)


class Thrift:
    """Read Thrift's compact protocol: structs become mappings from field number to value."""

    def __init__(self, data: Any, place: int) -> None:
        if place < 0:
            raise ValueError("a place before the file")
        self.data, self.place = data, place

    def byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number without end")

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def take(self, count: int) -> bytes:
        self.place += count
        if self.place > len(self.data):
            raise ValueError("the file ends in a value")
        return self.data[self.place - count : self.place]

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return all fields up to the stop; raises a ValueError where the bytes are no struct."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.zigzag()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self.value(kind, depth + 1)
        return fields

    def value(self, kind: int, depth: int) -> Any:
        """Return a value of one of the protocol's types, as it stands in a list or after a field's head."""
        if depth > DEPTH:
            raise ValueError("nested too deeply")
        if kind in (1, 2, 3):
            return self.byte()
        if kind in (4, 5, 6):
            return self.zigzag()
        if kind == 7:
            return self.take(8)
        if kind == 8:
            return self.take(self.varint())
        if kind in (9, 10):
            return self.list(depth)
        if kind == 12:
            return self.struct(depth)
        raise ValueError(f"a value of type {kind}")

    def list(self, depth: int) -> list[Any]:
        head = self.byte()
        count = self.varint() if head >> 4 == 15 else head >> 4
        if count > len(self.data) - self.place:
            raise ValueError("a list longer than the file")
        return [self.value(head & 15, depth + 1) for _ in range(count)]
