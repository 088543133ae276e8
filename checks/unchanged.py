"""Does a changed source tree still do, bit for bit, what another one did? Both are used by their command line alone.

    python checks/unchanged.py OLD/src NEW/src --work DIR               # all cases, about ten minutes for each tree
    python checks/unchanged.py OLD/src NEW/src --work DIR --only bone   # the cases whose names match

Each tree trains every method for five steps on a random two-layer Llama, other tasks and settings too, folds, merges,
exports, imports, inspects, evaluates, plans, compares and tunes. Then a third folder begins with what OLD left: NEW
converts its adapters, trains on its folds, takes starts and spectra from its cache, and resumes its runs from their
checkpoints of step 2; all of it must end as it did in OLD. A line per case says `same` or what differs; exit status 1
if anything does. Files are compared byte by byte, without the times and the peak memory that were measured; of text
for people (output, cards, pages) the numbers and flags count, and where only words differ, `same numbers` is said.

What a tree left is kept in DIR, and only what is missing is run again, unless the tree or the cases have changed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unchanged_cases import CASES, DRIVER, MODELS, data


def digest(source: Path) -> str:
    """Of a tree, and of the models it gets."""
    found = hashlib.sha256(MODELS.encode())
    for path in sorted(source.rglob("*.py")):
        found.update(path.relative_to(source).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


@contextmanager
def at(work: Path, side: str) -> Iterator[Path]:
    """Every side works in a folder of one and the same path, so that no file differs by the paths that it names."""
    here = work / "here"
    (work / side).mkdir(parents=True, exist_ok=True)
    (work / side / "side").write_text(side)
    (work / side).rename(here)
    try:
        yield here
    finally:
        here.rename(work / side)


def begin(work: Path, here: Path, side: str) -> None:
    """Lay out what a side starts from: models and data, or what the old tree left."""
    if side == "cross":
        for name in ("tiny", "bert", "t5", "data", "fold", "train", "cache"):
            shutil.copytree(work / "old" / name, here / name)
        for path in (here / "cache").rglob("*.safetensors"):
            os.utime(path, (0, 0))  # an entry that is used gets today's
        return
    subprocess.run([sys.executable, "-W", "ignore", "-c", MODELS], cwd=here, check=True)
    data(here / "data")


def clear(work: Path, here: Path, name: str) -> None:
    """Make room for a case; one that resumes finds the run as it was after step 2."""
    if not name.startswith("resume/"):
        for path in outputs(here, name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    run = here / name.replace("resume", "train", 1)
    shutil.rmtree(run)
    shutil.copytree(work / "old" / "train" / run.name, run)
    later = [path for path in (run / "checkpoints").iterdir() if path.name != "checkpoint-2"]
    for path in (*later, *(run / part for part in ("adapter", "model", "plots"))):
        shutil.rmtree(path, ignore_errors=True)
    for part in ("report.html", "changes.json", "samples.md"):
        (run / part).unlink(missing_ok=True)


def outputs(here: Path, name: str) -> list[Path]:
    """Where a case writes."""
    name = name.replace("resume/", "train/")
    return [path for end in ("", ".json", ".csv") if (path := here / f"{name}{end}").exists()]


def do(work: Path, side: str, source: Path, cases: dict[str, str], only: str) -> None:
    """Run the cases of a side that have not been run."""
    if (work / "here").exists():  # a side that was at work when it was killed
        (work / "here").rename(work / (work / "here" / "side").read_text())
    mark = digest(source) + ((work / "old" / "mark").read_text() if side == "cross" else "")
    if (work / side / "mark").exists() and (work / side / "mark").read_text() != mark:
        shutil.rmtree(work / side)
    with at(work, side) as here:
        if not (here / "mark").exists():
            begin(work, here, side)
            (here / "mark").write_text(mark)
        asked = {name: shlex.split(words.replace("OUT", str(here / name))) for name, words in cases.items()}
        left = [name for name in cases if re.search(only, name) and asked[name] != done(here, name)[1]]
        print(f"{side}: {len(left)} of {len(cases)} cases to run with {source}", flush=True)
        for resume in (False, True):
            names = [name for name in left if name.startswith("resume/") == resume]
            for name in names:
                clear(work, here, name)
                (here / name).parent.mkdir(parents=True, exist_ok=True)
            if names:
                driver(here, source, json.dumps([str(source), [(name, asked[name]) for name in names]]))


def done(folder: Path, name: str) -> tuple[int, list[str]]:
    """The exit status of a case, and what was asked; neither, where it was not run."""
    file = folder / "log" / f"{name}.code"
    return tuple(json.loads(file.read_text())) if file.exists() else (-1, [])


def driver(here: Path, source: Path, asked: str) -> None:
    """Run cases, one at a time."""
    more = {"PYTHONPATH": str(source), "INLAY_CACHE": "cache", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    more["PYTHONHASHSEED"] = "0"  # PEFT writes sets as they come
    command = [sys.executable, "-P", "-W", "ignore", "-c", DRIVER]
    subprocess.run(command, input=asked, text=True, cwd=here, env={**os.environ, **more}, check=True)


# -- what is compared --------------------------------------------------------------------------------------------------

MEASURED = {"seconds", "memory", "seconds_per_step", "eval_runtime", "eval_samples_per_second"}
MEASURED |= {"eval_steps_per_second", "eval_model_preparation_time"}
MEASURED |= {"eval_num_tokens"}  # trl counts it from the start of the process, so a resumed run has another
WORDS = {"reason"}  # sentences in JSON
PLOTS = {"memory", "seconds", "stack"}
TEXT, DRAWN = {".md", ".html", ".txt", ".out", ".err"}, {".png", ".svg"}
MEASURED_PLOT = re.compile(r'<svg [^>]*aria-label="[^"]*(?:[Mm]emory|time).*?</svg>', re.DOTALL)
TIMES = re.compile(r'\b\d+:\d\d\b|(?:data-value="[\d.]+">)?[\d.,]+ (?:tokens/s|[KMG]iB|s\b)')


def exact(path: Path) -> bytes:
    """A file as it must not change: without what was measured of time and memory."""
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return json.dumps([unmeasured(json.loads(line), path) for line in lines]).encode()
    if path.suffix == ".yaml":
        return re.sub(r"(?m)^#.*", lambda line: " ".join(numbers(line[0].encode())), path.read_text()).encode()
    if path.name == "results.csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        return json.dumps([unmeasured(row, path) for row in rows]).encode()
    if path.suffix not in TEXT:
        return path.read_bytes()
    lines = re.sub(MEASURED_PLOT, "", path.read_text()).splitlines()
    kept = [line for line in lines if path.suffix != ".err" or line.startswith("inlay: ")]  # libraries write there too
    planned = path.parent.name in ("plan", "fold") and path.suffix == ".out"  # its sizes are computed, not measured
    return re.sub(r"[\s─━┏┳┓┡╇┩└┴┘]+", " ", " ".join(kept) if planned else TIMES.sub("", " ".join(kept))).encode()


def unmeasured(value: Any, path: Path) -> Any:
    """JSON without what was measured; a manifest without the digests of files that hold it, and what seals them."""
    if isinstance(value, list):
        return [unmeasured(item, path) for item in value]
    if not isinstance(value, dict):
        return value
    gone = (
        MEASURED
        | WORDS
        | ({"seal", "metrics.jsonl", "trainer_state.json", "README.md"} if path.name == "manifest.json" else set())
    )
    return {key: unmeasured(item, path) for key, item in value.items() if key not in gone}


def numbers(text: bytes) -> list[str]:
    """What of a text for people must not change, in whatever words: its numbers, and flags. Plots are left out."""
    plain = re.sub(r"<(svg|style|script)\b.*?</\1>", " ", text.decode(errors="replace"), flags=re.DOTALL)
    return re.findall(r"(?<![\w-])--[a-z][\w-]*|(?<!\w)[-+]?\d[\d.,:e+-]*", re.sub(r"<[^>]*>", " ", plain))


def files(folder: Path, paths: list[Path]) -> dict[str, Path]:
    """All files under some paths, by their names in a folder, without plots of what was measured and Optuna's dates."""
    found = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    kept = [file for file in found if file.suffix != ".db" and file.stem not in PLOTS]
    return {file.relative_to(folder).as_posix(): file for file in kept}


def differences(one: Path, other: Path, name: str) -> tuple[list[str], list[str]]:
    """Of a case in two sides: the files that differ, and those in which only words (or plots) do."""
    logs = [] if name.startswith("resume/") else [f"log/{name}{end}" for end in (".out", ".err")]
    left, right = (files(at, [*outputs(at, name), *(at / log for log in logs)]) for at in (one, other))
    bad = [f"{file} is missing" for file in left.keys() - right.keys()]
    bad += [f"{file} is new" for file in right.keys() - left.keys()]
    words = []
    for file in sorted(left.keys() & right.keys()):
        a, b = exact(left[file]), exact(right[file])
        if a != b:
            form = left[file].suffix
            same = form in DRAWN or (form in TEXT and numbers(a) == numbers(b))
            (words if same else bad).append(file)
    code = done(other, name)[0]
    if code != (2 if name.startswith("mistake/") else 0):
        error = (other / "log" / f"{name}.err").read_text().strip()
        bad.append(f"exit status {code}: {error[-200:]}")
    return bad, words


def cache_judged(work: Path, side: str) -> list[str]:
    """Compare the cache of a side with the old tree's: no entry differs, and where it was handed over, it was used."""
    left, right = (files(at, [at / "cache"]) for at in (work / "old", work / side))
    bad = [name for name in left.keys() & right.keys() if left[name].read_bytes() != right[name].read_bytes()]
    bad += [name for name in left.keys() ^ right.keys() if "/spectra/" in name]  # a start is kept only if it took long
    if side == "cross":
        before, taken = {kind(name) for name in left}, {kind(name) for name, path in right.items() if used(path)}
        bad += [f"nothing of {name} was used" for name in sorted(before - taken)]
    print(f"{side} cache: " + (f"DIFFERS: {', '.join(bad)}" if bad else f"same, {len(left)} entries"))
    return [f"{side} cache"] * bool(bad)


def kind(entry: str) -> str:
    """An entry of the cache without what says of which weight it is."""
    return entry.rpartition("-")[0] or "cache/spectra"


def used(entry: Path) -> bool:
    """Whether an entry of the cache was used since its time was set back."""
    return entry.stat().st_mtime > 0


def named(folder: Path, source: Path) -> list[str]:
    """The files for machines in which a path of a module of the package stands: they would not outlive its move."""
    modules = sorted({path.stem for path in (source / "inlay").iterdir()} - {"__init__", "__main__", "__pycache__"})
    path = re.compile(rb"\binlay\.(" + "|".join(modules).encode() + rb")\b")
    kept = files(folder, [folder / part for part in ("train", "fold", "lora", "merge", "gguf", "cache")])
    return [f"{name}: {found[0]!r}" for name, file in kept.items() if file.suffix not in TEXT
            if (found := path.search(file.read_bytes()))]  # fmt: skip


def judged(work: Path, side: str, cases: list[str]) -> list[str]:
    """Compare a side with the old tree's, a line for each case; the names of those that differ."""
    wrong = []
    for name in cases:
        bad, words = differences(work / "old", work / side, name)
        said = f"same numbers, other words: {', '.join(words)}" if words else "same"
        print(f"{side} {name}: " + (f"DIFFERS: {', '.join(bad)}" if bad else said), flush=True)
        wrong += [f"{side} {name}"] if bad else []
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the src folder of the tree as it was")
    parser.add_argument("new", type=Path, help="the src folder of the changed tree")
    parser.add_argument("--work", type=Path, default=Path("unchanged-work"), help="folder of what both leave")
    parser.add_argument("--only", default="", help="a regex of the names of cases (the old tree does all)")
    asked = parser.parse_args()
    work, trees = asked.work.resolve(), (asked.old.resolve(), asked.new.resolve())
    do(work, "old", trees[0], CASES["own"], "")
    do(work, "new", trees[1], CASES["own"], asked.only)
    do(work, "cross", trees[1], CASES["cross"], asked.only)
    cases = {"new": CASES["own"], "cross": CASES["cross"]}
    chosen = {side: [name for name in names if re.search(asked.only, name)] for side, names in cases.items()}
    wrong = [bad for side, names in chosen.items() for bad in judged(work, side, names)]
    if not asked.only:
        wrong += [bad for side in chosen for bad in cache_judged(work, side)]
    paths = [path for side in ("old", *cases) for tree in trees for path in named(work / side, tree)]
    print("paths of modules in saved files: " + (f"DIFFERS: {', '.join(paths[:9])}" if paths else "none"))
    wrong += ["paths of modules"] * bool(paths)
    count = sum(map(len, chosen.values()))
    print(f"{count} cases, {len(wrong)} differ" + (f": {', '.join(wrong)}" if wrong else ""))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
