"""Train every recipe of recipes/small on the built-in model, one process each, and write the table that ends
docs/papers.md: python benchmarks/papers.py [NAME ...]. One seed and one learning rate each: it shows that a method
trains, not which one is best. Rows of recipes that are not run again are kept."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "papers"
COLUMNS = ("recipe", "method", "trained first", "trained last", "loss before", "loss after", "seconds", "peak GiB")


def measure(recipe: Path, folder: Path) -> dict[str, object]:
    """One run, and what its metrics say."""
    run = [sys.executable, "-m", "inlay", "train", str(recipe), "--output", str(folder), "--samples", "0"]
    subprocess.run(run, check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, held = [r for r in rows if "trained" in r], [r["eval_loss"] for r in rows if "eval_loss" in r]
    numbers = {"trained first": steps[0]["trained"], "trained last": steps[-1]["trained"]}
    loss = {"loss before": f"{held[0]:.3f}", "loss after": f"{held[-1]:.3f}"}
    cost = {"seconds": round(steps[-1]["seconds"]), "peak GiB": f"{steps[-1]['memory'] / 2**30:.2f}"}
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return {"recipe": recipe.stem, "method": config["method"], **numbers, **loss, **cost}


def main() -> None:
    """Measure the recipes asked for, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of recipes/small (default: all)")
    names = parser.parse_args().names or sorted(path.stem for path in (ROOT / "recipes" / "small").glob("*.yaml"))
    table = OUT.with_suffix(".csv")
    done = {row["recipe"]: row for row in csv.DictReader(table.open())} if table.exists() else {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            done[name] = measure(ROOT / "recipes" / "small" / f"{name}.yaml", Path(folder) / name)
        rows = [done[key] for key in sorted(done)]
        with table.open("w", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in rows]
        table_text = "\n".join(lines) + "\n"
        OUT.with_suffix(".md").write_text(table_text)
        page = ROOT / "docs" / "papers.md"
        head = page.read_text().partition("| recipe |")[0]
        page.write_text(head + table_text)


if __name__ == "__main__":
    main()
