"""Data that memory does not hold: shards of JSONL or Parquet, which `datasets` reads in file order as they are used."""

from __future__ import annotations

import glob
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import IterableDataset

from inlay.data.formats import convert_records

BUILDERS = {".jsonl": "json", ".parquet": "parquet"}


def shards(source: str) -> list[Path]:
    """The files that a path, a folder or a glob names, in the order of their names.

    Raises:
        ValueError: there are none, or they are not all JSONL or all Parquet.
    """
    path = Path(source).expanduser()
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1 or not kinds <= BUILDERS.keys():
        there = ", ".join(sorted(kinds)) or "no file"
        raise ValueError(f"{source}: found {there}; streaming reads {' or '.join(BUILDERS)} files, all of one kind")
    return files


def streamed_examples(source: str, columns: dict[str, str] | None, system: str | None) -> IterableDataset:
    """The records of all shards as `data.examples` makes them, one after the other.

    Raises:
        ValueError: there are no shards, or (when it comes to it) a record is not of the first one's format.
    """
    files = shards(source)
    kind = BUILDERS[files[0].suffix.lower()]
    records: Any = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=True)
    try:
        first = next(iter(records))
    except StopIteration:
        raise ValueError(f"{source}: found no record; accepted: at least one") from None

    def convert(batch: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        made = convert_records(rows, columns, system)
        return {name: [row[name] for row in made] for name in made[0]}

    return records.map(convert, batched=True, batch_size=100, remove_columns=list(first))


def first_examples(stream: IterableDataset, count: int) -> list[dict]:
    """The first examples."""
    return list(islice(stream, count))
