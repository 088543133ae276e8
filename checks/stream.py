"""Does memory stay flat while a file is read that is larger than the memory allowed for it?

    python checks/stream.py [--megabytes 600] [--limit 200]

Writes a JSONL file of so many megabytes, passes once over the examples that `inlay train --streaming` would train on,
and prints by how much the process grew. Exit status 1 where that is more than the limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import psutil

from inlay.data.formats import Rules
from inlay.data.readers import Reading
from inlay.data.streaming import first_examples, open_stream


def write(path: Path, size: int) -> int:
    """Records of about 2 kB, so many bytes of them; how many there are."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            file.write(
                json.dumps({"question": f"What is {count}? {'word ' * 300}", "answer": f"{count} {'so ' * 160}"}) + "\n"
            )
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--limit", type=int, default=200)
    options = parser.parse_args()
    it = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        count = write(Path(folder) / "data.jsonl", options.megabytes * 2**20)
        before, most, seen = it.memory_info().rss, 0, 0
        stream = open_stream(folder, Rules(), Reading())  # which reads it through once
        first_examples(stream.examples, 1000)
        most = it.memory_info().rss - before
        for _ in stream.examples:
            seen += 1
            if seen % 1000 == 0:
                most = max(most, it.memory_info().rss - before)
    assert seen == count == stream.count
    print(f"{seen:,} records, {options.megabytes} MiB: memory grew by {most / 2**20:.0f} MiB at most")
    sys.exit(most > options.limit * 2**20)


if __name__ == "__main__":
    main()
