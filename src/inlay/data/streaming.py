"""Data that memory does not hold: shards of JSONL, tables, Parquet or Arrow, read in file order as they are used.

Before a stream is handed on, all of it is read through once. So roles are assigned by all records, as they are where
data is read at once; what is at fault or not used is said before training starts; and a stream that has changed is
noticed when a run resumes.
"""

from __future__ import annotations

import glob
import hashlib
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from datasets import IterableDataset

from inlay.data.chats import Example
from inlay.data.columns import Survey
from inlay.data.folders import Parts, folder_parts, kind_of
from inlay.data.formats import FORMATS, Conversion, Faults, Rules, example_key, instruction_converter
from inlay.data.readers import KINDS, Reading, file_records
from inlay.data.records import Record
from inlay.data.render import answer_weights
from inlay.files.untrusted import regular_file, user_path

STREAMED_KINDS = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
EXAMPLE_COLUMNS = ("text", "prompt", "completion", "tools", "chat_template_kwargs")  # what an example may hold
GUESSED_BY = 1000  # records that the roles are first assigned by


@dataclass(frozen=True)
class Reader:
    """Hold what `_examples` gets: the files of a source, and how they are read and converted."""

    files: tuple[str, ...]
    conversion: Conversion
    encoding: str
    tsv_quotes: str

    def examples(self) -> Iterator[Example]:
        """Yield the examples of all files."""
        return _examples(list(self.files), self.conversion, self.encoding, self.tsv_quotes)


@dataclass
class Stream:
    """Hold the examples of all shards and what was found about them.

    That is how many there are, how many of them are held out as well, each shard's name, size and digest, and whether
    some answers have a weight other than 0 and 1.
    """

    examples: IterableDataset
    count: int
    repeated: int
    shards: tuple[tuple[str, int, str], ...]
    weighted: bool = False
    how: Reader | None = None  # of the one source that it has


def shards(source: str, reading: Reading | None = None) -> list[Path]:
    """Return the files to train on that a path, a folder or a glob names, in the order of their names.

    Raises:
        ValueError: there are none, or they are not all JSONL, all Parquet or all Arrow.
    """
    path = regular_file(user_path(source))
    if path.is_dir():
        parts = folder_parts(path, None, KINDS) if any(path.iterdir()) else Parts(path, {"train": []})
        files = parts.files["train"]
        if reading:
            reading.notes += parts.notes
    else:
        found = map(Path, glob.glob(str(path), recursive=True))
        files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    kinds = {kind_of(file) for file in files}
    if len(kinds) != 1 or not kinds <= set(STREAMED_KINDS):
        there = ", ".join(sorted(kinds)) or "no file"
        raise ValueError(
            f"{source}: found {there}; streaming reads {' or '.join(STREAMED_KINDS)} files, all of one kind"
        )
    return files


def open_stream(
    source: str, rules: Rules, reading: Reading, heldout: list[Example] | None = None, first: int = 0
) -> Stream:
    """Read all shards through, and make a stream of their examples. Held out are `heldout`, or else the `first` ones.

    Raises:
        ValueError: there are no shards or no records, no format fits, or rows are at fault.
    """
    files = shards(source, reading)
    conversion = _guess(files, rules, reading)
    while True:
        seen = Survey()
        faults = Faults(rules)
        count = 0
        repeated = 0
        weighted = False
        held = set(map(example_key, heldout or ()))
        for place, record in _placed(files, reading):
            seen.add(record)
            for example in faults.attempt(conversion, record, lambda place=place: place) if conversion else ():
                count += 1
                weighted = weighted or any(weight != 1 for weight in answer_weights(example))
                if not heldout and count <= first:
                    held.add(example_key(example))
                else:
                    repeated += example_key(example) in held
        if not seen.names:
            raise ValueError(f"{source}: found no row of data in it; accepted: at least one")
        by_all = Conversion(seen, rules, FORMATS, instruction_converter(rules))
        if conversion is not None and conversion.roles == by_all.roles:
            break
        conversion = by_all
    faults.check()
    conversion.found.unused, conversion.found.nothings = by_all.found.unused, by_all.found.nothings
    rules.found.add(conversion.found)
    about = tuple((file.name, file.stat().st_size, _digest(file)) for file in files)
    how = Reader(tuple(map(str, files)), conversion, reading.encoding, reading.tsv_quotes)
    return Stream(_dataset(how), count, repeated, about, weighted, how)


def mix_streams(streams: list[Stream], weights: list[float]) -> Stream:
    """Make one stream of several, in which the rows of each stand as often as its weight says, spread evenly.

    A weight of 2 has a stream read twice an epoch; 0.5 takes every other of its examples. Nothing is drawn, so that the
    order is the same whenever it is read.
    """
    parts = tuple((one.how, weight, one.count) for one, weight in zip(streams, weights, strict=True) if one.how)
    return Stream(
        IterableDataset.from_generator(_mixed, gen_kwargs={"parts": parts}),
        sum(taken(one.count, weight) for one, weight in zip(streams, weights, strict=True)),
        sum(one.repeated for one in streams),
        tuple(shard for one in streams for shard in one.shards),
        any(one.weighted for one in streams),
    )


def taken(count: int, weight: float) -> int:
    """Return how many examples an epoch has of a stream of `count`."""
    return math.floor(count * weight + 1e-6)


def _mixed(parts: tuple[tuple[Reader, float, int], ...]) -> Iterator[Example]:
    """Yield the examples of all streams, each time of the one that is furthest behind its share."""
    sources = [_repeated(how, weight) for how, weight, _ in parts]
    totals = [taken(count, weight) for _, weight, count in parts]
    waiting = [(0.5 / total, i, 1) for i, total in enumerate(totals) if total]  # when, of whom, which of its examples
    heapq.heapify(waiting)
    while waiting:
        _, i, number = heapq.heappop(waiting)
        yield next(sources[i])
        if number < totals[i]:
            heapq.heappush(waiting, ((number + 0.5) / totals[i], i, number + 1))


def _repeated(how: Reader, weight: float) -> Iterator[Example]:
    for turn in range(math.ceil(weight)):
        share = min(1.0, weight - turn)
        for i, example in enumerate(how.examples()):
            if taken(i + 1, share) > taken(i, share):
                yield example


def _guess(files: list[Path], rules: Rules, reading: Reading) -> Conversion | None:
    """Return a conversion by the first records, which is that of all records unless others have more columns."""
    seen = Survey()
    for _, record in islice(_placed(files, reading), GUESSED_BY):
        seen.add(record)
    try:
        return Conversion(seen, rules, FORMATS, instruction_converter(rules))
    except ValueError:
        return None


def _placed(files: list[Path], reading: Reading) -> Iterator[tuple[str, Record]]:
    """Yield the records of all files, and where each stands."""
    for file in files:
        for number, record in file_records(file, reading, whole=False):
            yield f"{file.name}, {reading.unit} {number}", record


def _dataset(how: Reader) -> IterableDataset:
    return IterableDataset.from_generator(_examples, gen_kwargs={**vars(how), "files": list(how.files)})  # is divided


def _examples(files: list[str], conversion: Conversion, encoding: str, tsv_quotes: str) -> Iterator[Example]:
    for place, record in _placed([Path(file) for file in files], Reading(encoding, tsv_quotes)):
        try:
            yield from conversion(record)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _digest(file: Path) -> str:
    with regular_file(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def first_examples(stream: IterableDataset, count: int) -> list[Example]:
    """Return the first examples."""
    return list(islice(stream, count))
