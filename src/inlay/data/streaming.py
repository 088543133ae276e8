"""Data that memory does not hold: shards of JSONL or Parquet, which `datasets` reads in file order as they are used."""

from __future__ import annotations

import glob
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import IterableDataset

from inlay.data.chats import Example
from inlay.data.readers import Record

BUILDERS = {".jsonl": "json", ".parquet": "parquet"}
STREAMED = ("text", "prompt", "completion", "tools", "chat_template_kwargs")  # what an example may hold


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


def streamed_examples(source: str, conversations: Callable[[list[Record]], list[Example]]) -> IterableDataset:
    """The records of all shards as `conversations` makes examples of them, one after the other.

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
        made = conversations(rows)
        names = [name for name in STREAMED if any(name in row for row in made)]
        return {name: [row.get(name) for row in made] for name in names}

    return records.map(convert, batched=True, batch_size=100, remove_columns=list(first))


def first_examples(stream: IterableDataset, count: int) -> list[Example]:
    """The first examples."""
    return [{key: value for key, value in one.items() if value is not None} for one in islice(stream, count)]
