"""`inlay plan`: all methods beside PEFT's LoRA and full fine-tuning, what they need or how much of each fits."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import is_bitsandbytes_available

from inlay.files.atomic import write_text
from inlay.host.config import InlayConfig
from inlay.messages import gib
from inlay.methods import METHODS, find
from inlay.planning.planner import FrozenLimit, PlannedRun, size_name
from inlay.planning.step_simulator import Step
from inlay.recipe.reading import hyperparameters, load_recipe

SHARE = 0.9  # of a GPU's memory that a step may fill; the rest is its driver's, the libraries', and lost between blocks
SHORTEST = 128  # tokens worth training on
WHERE = ("target_modules", "exclude_modules", "layers_to_transform")
PEFT, FULL = "PEFT LoRA", "full"

Candidate = tuple[str, PeftConfig | None]


@dataclass(frozen=True)
class Row:
    """What one method needs; `time` is over the frozen limit's."""

    method: str
    size: int | None
    base: str
    checkpointing: bool
    batch_size: int
    length: int
    step: Step
    time: float

    def record(self) -> dict[str, Any]:
        """For machines: bytes, numbers and FLOPs as integers."""
        step = {k: round(v) for k, v in asdict(self.step).items()}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "step"}
        return {**own, **step, "peak": round(self.step.peak)}


@dataclass(frozen=True)
class Fit:
    """The largest that fits: a batch of that length, or a rank (a power of two); None: nothing does."""

    method: str
    size: int | None
    base: str
    checkpointing: bool
    batch_size: int | None
    length: int
    peak: int | None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def candidates(flags: dict[str, Any], sizes: Sequence[int]) -> list[Candidate]:
    """What is compared, from recipe fields: the method they name or all, at each size; PEFT's LoRA; everything.

    Raises:
        ValueError: an unknown method, or a hyperparameter it does not have.
    """
    asked, made = flags.get("method"), list[Candidate]()
    for size in sizes:
        for name in [asked] if asked else [m.name for m in METHODS]:
            own = {f.name for f in fields(find(name))}
            given = {k: v for k, v in flags.items() if asked or k not in hyperparameters() or k in own}
            made.append((name, load_recipe(None, {size_name(name): size, **given, "method": name}).config()))
        where = {k: getattr(made[-1][1], k) for k in WHERE}
        made.append((PEFT, LoraConfig(r=size, task_type="CAUSAL_LM", **where)))
    return [*made, (FULL, None)]


def frozen_limit(made: Sequence[Candidate]) -> InlayConfig:
    """The frozen limit on the same modules."""
    where = {k: getattr(made[0][1], k) for k in WHERE}
    return InlayConfig(method=FrozenLimit(), task_type="CAUSAL_LM", **where)


def widths(kinds: Sequence[str], notes: list[str]) -> list[str]:
    """Those of the bases' widths that can be planned here."""
    if is_bitsandbytes_available():
        return list(kinds)
    notes.append("bases of 8 and 4 bits need bitsandbytes: pip install 'bitsandbytes>=0.46'")
    return ["none"]


def planned_runs(of: PlannedRun, made: Sequence[Candidate], kinds: Sequence[str]) -> Iterator[tuple[str, PlannedRun]]:
    """Every candidate in every width (all of a model can only be trained where it is not quantised), checkpointed and
    not, beginning with what asks for least patience."""
    for name, config in made:
        for kind in kinds if config is not None else ("none",):
            for checkpointing in (False, True):
                yield name, replace(of, config=config, quantize=kind, checkpointing=checkpointing)


def plan_rows(
    of: PlannedRun, made: Sequence[Candidate], kinds: Sequence[str], batch: int, length: int, notes: list[str]
) -> list[Row]:
    """What each candidate needs. One of several that does not fit the model is left out, with a note."""
    floor = replace(of, config=frozen_limit(made)).step(batch, length).flops
    found, flops = [], dict[tuple[int, bool], float]()
    for name, run in planned_runs(of, made, ["none", *(k for k in kinds if k != "none")]):
        try:
            step, key = run.step(batch, length), (id(run.config), run.checkpointing)
        except ValueError as error:
            note_or_raise(error, made, notes)
            continue
        flops.setdefault(key, step.flops)  # of the base as it is: quantised products are not seen
        if run.quantize in kinds:
            found.append(
                Row(name, run.size, base_name(run), run.checkpointing, batch, length, step, flops[key] / floor)
            )
    return found


def fits(
    of: PlannedRun, made: Sequence[Candidate], kinds: Sequence[str], budget: float, batch: int | None, length: int,
    notes: list[str],
) -> list[Fit]:  # fmt: skip
    """The largest batch of sequences of `length` that fits (of shorter ones, where not one does), or at a given batch
    the largest rank; the most useful first: wide bases before narrow ones, then without checkpointing, then tokens."""
    found = []
    for name, run in planned_runs(of, made, kinds):
        try:
            if batch is None:
                found.append(largest_batch(name, run, budget, length))
            elif run.config is not None:
                sizes = [n for n in run.sizes() if n & (n - 1) == 0]
                size = run.largest_size(lambda r: r.step(batch, length).peak, budget, sizes)
                peak = None if size is None else round(run.sized(size).step(batch, length).peak)
                found.append(Fit(name, size, base_name(run), run.checkpointing, batch, length, peak))
        except ValueError as error:
            note_or_raise(error, made, notes)
    order = [base_name(replace(of, quantize=kind)) for kind in kinds]

    def use(fit: Fit) -> tuple:
        amount = (fit.size or 0) if batch else (fit.batch_size or 0) * fit.length
        return fit.peak is None, order.index(fit.base), fit.checkpointing, -amount

    return sorted(found, key=use)


def largest_batch(name: str, run: PlannedRun, budget: float, length: int) -> Fit:
    """The largest batch of `length`, or of the half of it, or of that, ..."""
    while True:
        batch = run.largest_batch(length, budget)
        if batch or length // 2 < SHORTEST:
            peak = round(run.step(batch, length).peak) if batch else None
            return Fit(name, run.size, base_name(run), run.checkpointing, batch or None, length, peak)
        length //= 2


def note_or_raise(error: ValueError, made: Sequence[Candidate], notes: list[str]) -> None:
    """Raise what is wrong with the one method asked for; of several, say it."""
    if len({name for name, _ in made} - {PEFT, FULL}) == 1 or "without its weights" in str(error):
        raise error
    text = str(error).partition(": ")[2] or str(error)
    if text not in notes:
        notes.append(text)


def base_name(run: PlannedRun) -> str:
    """A base's width in words."""
    return str(run.dtype).removeprefix("torch.") if run.quantize == "none" else run.quantize


def show_plan(found: Sequence[Row], console: Console) -> None:
    """A table for each base."""
    for name in dict.fromkeys(row.base for row in found):
        what = f"batch {found[0].batch_size} × {found[0].length} tokens, base in {name}"
        title = f"{what}; GiB; time over the frozen limit's; ckpt: gradient checkpointing"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        heads = "method|r|trained|file,\nMiB|frozen|grads,\nmoments|saved|peak|ckpt\npeak|time|ckpt\ntime"
        for head in heads.split("|"):
            table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
        own = [row for row in found if row.base == name]
        for row, twin in zip(own[::2], own[1::2], strict=True):
            step = row.step
            sizes = [step.frozen, step.gradients + step.optimizer, step.activations, step.peak, twin.step.peak]
            table.add_row(
                row.method, str(row.size or ""), f"{step.parameters:,.0f}", f"{step.file / 2**20:,.1f}",
                *(f"{size / 2**30:.2f}" for size in sizes), f"{row.time:.2f}", f"{twin.time:.2f}",
            )  # fmt: skip
        console.print(table)


def show_fits(found: Sequence[Fit], gigabytes: float, by_rank: bool, console: Console) -> None:
    """The best answer in words, and a table of all."""
    best = found[0] if found and found[0].peak is not None else None
    if best is None:
        console.print(f"nothing fits in {gigabytes:g} GB; shorten --length, or take a smaller model")
        return
    saving = ", gradient checkpointing" if best.checkpointing else ""
    size = f", r = {best.size}" if best.size else ""
    console.print(
        f"in {gigabytes:g} GB: {best.method}{size}, base in {best.base}{saving}: "
        f"batch {best.batch_size} × {best.length} tokens (peak {gib(best.peak or 0)})"
    )
    kinds = list(dict.fromkeys((fit.base, fit.checkpointing) for fit in sorted(found, key=lambda f: f.base == "nf4")))
    what = "largest rank" if by_rank else "largest batch × length"
    title = f"{what}; ckpt: gradient checkpointing"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("method", no_wrap=True)
    for kind, checkpointing in kinds:
        table.add_column(f"{kind}\nckpt" if checkpointing else kind, justify="right", no_wrap=True)
    names = dict.fromkeys((fit.method, None if by_rank else fit.size) for fit in found)
    for name, size in names:
        own = [f for f in found if f.method == name and (by_rank or f.size == size)]
        cells = {(f.base, f.checkpointing): fit_text(f, by_rank) for f in own}
        table.add_row(f"{name}, r = {size}" if size else name, *(cells.get(kind, "") for kind in kinds))
    console.print(table)


def fit_text(fit: Fit, by_rank: bool) -> str:
    if fit.peak is None:
        return "-"
    return str(fit.size) if by_rank else f"{fit.batch_size} × {fit.length}"


def write_plan(found: Sequence[Any], as_json: str | None, as_csv: str | None) -> None:
    """The rows for machines."""
    records = [row.record() for row in found]
    if as_json:
        write_text(Path(as_json), json.dumps(records, indent=1) + "\n")
    if as_csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
        write_text(Path(as_csv), text.getvalue())
