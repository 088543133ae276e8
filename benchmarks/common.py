"""What the benchmarks share: medians, peaks, and in what words a machine and a table are written down."""

from __future__ import annotations

import csv
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    """The hardware and the versions, for the head of a result table."""
    if DEVICE == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    kinds = {"amx_bf16": "with bf16 units", "avx512_bf16": "with bf16 instructions"}
    units = next((said for flag, said in kinds.items() if any(flag in line for line in lines)), "without bf16")
    name = names.pop() if len(names) == 1 else platform.machine()
    cores = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {units}"
    return f"{name}, {cores}, torch {torch.__version__}"


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def peak(work: Callable[[], object]) -> int:
    """The most bytes that `work` held at once beyond what was there before it."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(map(str, r))} |" for r in rows)]


def report(out: Path, name: str, about: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table below what it is about, and write both to `name`.md in `out`."""
    text = "\n".join([about, "", *table(header, rows), ""])
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
