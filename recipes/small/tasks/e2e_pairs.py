"""Write preference pairs from the built-in slice of E2E: a restaurant's text, and that of the most similar other one.

    python recipes/small/tasks/e2e_pairs.py FOLDER

FOLDER/pairs.jsonl has those of the training rows, FOLDER/held.jsonl those of the last 100.
"""

import csv
import json
import re
import sys
from importlib.resources import files
from pathlib import Path

HELD = 100


def attributes(row: dict[str, str]) -> set[tuple[str, str]]:
    """Return the attributes of a meaning representation with their values."""
    return set(re.findall(r"(\w[\w ]*)\[(.*?)\]", row["mr"]))


def pairs(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a pair for each row: the rejected text is of the row that shares most, but not all, of its attributes."""
    known = [attributes(row) for row in rows]
    made = []
    for row, own in zip(rows, known, strict=True):
        others = [(len(own & other), -len(other), i) for i, other in enumerate(known) if not other >= own]
        made.append({"prompt": row["mr"], "chosen": row["ref"], "rejected": rows[max(others)[2]]["ref"]})
    return [pair for pair in made if pair["chosen"] != pair["rejected"]]


def main(folder: Path) -> None:
    """Write both files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with files("inlay").joinpath("resources/e2e.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name, part in (("pairs", rows[:-HELD]), ("held", rows[-HELD:])):
        lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs(part)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
