"""Build the tables of `inlay plan`: what each method, PEFT's LoRA and full fine-tuning need, or how much fits."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from rich import box
from rich.console import Console
from rich.table import Table

from inlay.files.atomic import write_text
from inlay.host.config import InlayConfig
from inlay.messages import PACKAGES, dtype_name, gib, installed
from inlay.methods import every, find
from inlay.planning.planner import FrozenLimit, NotPlannedError, PlannedRun, size_name
from inlay.planning.step_simulator import Step
from inlay.recipe.reading import hyperparameters, load_recipe

SHARE = 0.9  # of a GPU's memory that a step may fill; the rest goes to the driver, the libraries and fragmentation
SHORTEST = 128  # tokens worth training on
WHERE = ("target_modules", "exclude_modules", "layers_to_transform")
PEFT, FULL = "PEFT LoRA", "full"

Candidate = tuple[str, PeftConfig | None]


@dataclass(frozen=True)
class Row:
    """Hold what one method needs; `time` is relative to the frozen limit's."""

    method: str
    size: int | None
    base: str
    checkpointing: bool
    batch_size: int
    length: int
    step: Step
    time: float

    def record(self) -> dict[str, Any]:
        """Return the row as flat data; bytes, parameters and FLOPs are integers."""
        step = {k: round(v) for k, v in asdict(self.step).items()}
        rest = {name: value for name, value in vars(self).items() if name != "step"}
        return {**rest, **step, "peak": round(self.step.peak)}


@dataclass(frozen=True)
class Fit:
    """Hold the largest run that fits: a batch and its length, or a rank (a power of two); None where nothing fits."""

    method: str
    size: int | None
    base: str
    checkpointing: bool
    batch_size: int | None
    length: int
    peak: int | None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def candidates(flags: dict[str, Any], sizes: Sequence[int | None]) -> list[Candidate]:
    """Return the configs to plan, by name, from recipe fields and ranks, where None is each method's own default.

    The recipe fields may name a method, else all are planned; PEFT's LoRA and full fine-tuning are added.

    Raises:
        ValueError: an unknown method, or a hyperparameter it does not have.
    """
    method = flags.get("method")
    compared: list[Candidate] = []
    for size in sizes:
        config = None
        for name in [method] if method else [m.name for m in every()]:
            names, field = {f.name for f in fields(find(name))}, size_name(name)
            if field is None and size != sizes[0]:
                continue
            settings = {k: v for k, v in flags.items() if method or k not in hyperparameters() or k in names}
            own = {} if field is None or size is None else {field: size}
            config = load_recipe(None, {**own, **settings, "method": name}).config()
            compared.append((name, config))
        rank = {} if size is None else {"r": size}
        compared.append((PEFT, LoraConfig(**rank, task_type="CAUSAL_LM", **where_of(config))))
    return [*compared, (FULL, None)]


def where_of(config: PeftConfig | None) -> dict[str, Any]:
    """Return the fields of a config that say which modules it adapts."""
    return {name: vars(config)[name] for name in WHERE}


def frozen_limit(compared: Sequence[Candidate]) -> InlayConfig:
    """Return the config of the frozen limit on the modules that the candidates adapt."""
    first = compared[0][1]
    experts = isinstance(first, InlayConfig) and first.experts
    return InlayConfig(method=FrozenLimit(), task_type="CAUSAL_LM", experts=experts, **where_of(first))


def widths(kinds: Sequence[str], notes: list[str]) -> list[str]:
    """Return those of `kinds` of quantisation that can be planned here; add a note on what is not followed, or not."""
    if installed("bitsandbytes"):
        return list(kinds)
    notes.append(f"8 bits are not planned without bitsandbytes: pip install {PACKAGES['bitsandbytes']}")
    return [kind for kind in kinds if kind != "int8"]


def planned_runs(
    of: PlannedRun, compared: Sequence[Candidate], kinds: Sequence[str]
) -> Iterator[tuple[str, PlannedRun]]:
    """Yield each candidate's run for each quantisation, without and with checkpointing.

    Full fine-tuning is planned unquantised only.
    """
    for name, config in compared:
        made: dict[tuple[str, bool], PlannedRun] = {}
        for kind, saving in itertools.product(kinds if config is not None else ("none",), (False, True)):
            like = made.get(("none", saving) if kind == "nf4" else (kind, False))
            made[kind, saving] = replace(of, config=config, quantize=kind, checkpointing=saving, like=like)
            yield name, made[kind, saving]


def plan_rows(
    of: PlannedRun, compared: Sequence[Candidate], kinds: Sequence[str], batch: int, length: int, notes: list[str],
    done: Callable[[str], None] = lambda name: None,
) -> list[Row]:  # fmt: skip
    """Return what each candidate needs; leave out, with a note, candidates that do not fit the model.

    Args:
        of: the run to plan, whose config is replaced.
        compared: the candidates.
        kinds: of quantisation.
        batch: sequences.
        length: tokens of each.
        notes: collects what is to be reported.
        done: called with the name of each candidate that is about to be planned.
    """
    floor = replace(of, config=frozen_limit(compared)).step(batch, length).flops
    rows: list[Row] = []
    flops: dict[tuple[int, bool], float] = {}
    for name, run in planned_runs(of, compared, ["none", *(k for k in kinds if k != "none")]):
        done(name)
        try:
            step = run.step(batch, length)
        except ValueError as error:
            note_or_raise(error, compared, notes)
            continue
        key = (id(run.config), run.checkpointing)
        flops.setdefault(key, step.flops)  # of the unquantised base: products of quantised weights are not counted
        if run.quantize in kinds:
            rows.append(Row(name, run.size, base_name(run), run.checkpointing, batch, length, step, flops[key] / floor))
    return rows


def fits(
    of: PlannedRun, compared: Sequence[Candidate], kinds: Sequence[str], budget: float, batch: int | None, length: int,
    notes: list[str], done: Callable[[str], None] = lambda name: None,
) -> list[Fit]:  # fmt: skip
    """Return the largest run of each candidate that fits, the most useful first.

    Runs on sequences of `length` come before those that must shorten them, unquantised bases before quantised ones,
    then runs without checkpointing, then those with most tokens.

    Args:
        of: the run to plan, whose config is replaced.
        compared: the candidates.
        kinds: of quantisation, the widest first.
        budget: bytes.
        batch: sequences; None: find the largest batch (with shorter sequences, if not one of `length` fits), else the
            largest rank.
        length: tokens of each sequence.
        notes: collects what is to be reported.
        done: called with the name of each candidate that is about to be planned.
    """
    results: list[Fit] = []
    for name, run in planned_runs(of, compared, kinds):
        done(name)
        try:
            if batch is None:
                results.append(largest_batch(name, run, budget, length))
            elif run.config is not None:
                sizes = [n for n in run.sizes() if n & (n - 1) == 0]
                size = run.largest_size(lambda r: r.step(batch, length).peak, budget, sizes)
                best = None if size is None else run.sized(size)
                peak = None if best is None else round(best.step(batch, length).peak)
                own = None if best is None else best.size
                results.append(Fit(name, own, base_name(run), run.checkpointing, batch, length, peak))
        except ValueError as error:
            note_or_raise(error, compared, notes)
    order = [base_name(replace(of, quantize=kind)) for kind in kinds]

    def use(fit: Fit) -> tuple:
        amount = (fit.size or 0) if batch else (fit.batch_size or 0) * fit.length
        return fit.peak is None, fit.length < length, order.index(fit.base), fit.checkpointing, -amount

    return sorted(results, key=use)


def largest_batch(name: str, run: PlannedRun, budget: float, length: int) -> Fit:
    """Return the largest batch of sequences of `length`, halved until one fits."""
    shortest = min(length, SHORTEST)
    while True:
        batch = run.largest_batch(length, budget)
        if not batch and run.step(1, shortest).peak > budget:
            return Fit(name, run.size, base_name(run), run.checkpointing, None, shortest, None)
        if batch or length // 2 < SHORTEST:
            peak = round(run.step(batch, length).peak) if batch else None
            return Fit(name, run.size, base_name(run), run.checkpointing, batch or None, length, peak)
        length //= 2


def note_or_raise(error: ValueError, compared: Sequence[Candidate], notes: list[str]) -> None:
    """Raise the error of the only method requested; with several, add it to the notes."""
    if len({name for name, _ in compared} - {PEFT, FULL}) == 1 or isinstance(error, NotPlannedError):
        raise error
    text = str(error).partition(": ")[2] or str(error)
    if text not in notes:
        notes.append(text)


def base_name(run: PlannedRun) -> str:
    """Return the dtype or the quantisation of a run's base."""
    return dtype_name(run.dtype) if run.quantize == "none" else run.quantize


def show_plan(rows: Sequence[Row], console: Console, labelled: float = 1.0) -> None:
    """Print a table for each kind of base, planned with the share `labelled` of the tokens."""
    for name in dict.fromkeys(row.base for row in rows):
        shown = f" ({labelled:.0%} labelled)" if labelled < 1 else ""
        what = f"batch {rows[0].batch_size} × {rows[0].length} tokens{shown}, base in {name}"
        title = f"{what}; GiB; time over the frozen limit's; ckpt: gradient checkpointing"
        table = Table(
            title=title, title_justify="left", box=None, padding=(0, 1), collapse_padding=True, pad_edge=False
        )
        heads = "method|r|trained|file,\nMiB|frozen|grads,\nmoments|saved|peak|ckpt\npeak|time|ckpt\ntime"
        for head in heads.split("|"):
            table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
        pairs = [row for row in rows if row.base == name]
        for row, twin in zip(pairs[::2], pairs[1::2], strict=True):
            step = row.step
            sizes = [step.frozen, step.gradients + step.optimizer, step.activations, step.peak, twin.step.peak]
            table.add_row(
                row.method, str(row.size or ""), amount(step.parameters), f"{step.file / 2**20:,.1f}",
                *(f"{size / 2**30:.2f}" for size in sizes), f"{row.time:.2f}", f"{twin.time:.2f}",
            )  # fmt: skip
        console.print(table)


def amount(number: float) -> str:
    """Format a number of parameters in few characters."""
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:,.2f} M" if number < 1e9 else f"{number / 1e9:,.2f} G"


def show_fits(results: Sequence[Fit], gigabytes: float, by_rank: bool, console: Console) -> None:
    """Print the best answer in words, and a table of all."""
    best = results[0] if results else None
    if best is None or best.peak is None:
        console.print(f"nothing fits in {gigabytes:g} GB; shorten --length, or take a smaller model")
        return
    saving = ", gradient checkpointing" if best.checkpointing else ""
    size = f", r = {best.size}" if best.size else ""
    console.print(
        f"in {gigabytes:g} GB: {best.method}{size}, base in {best.base}{saving}: "
        f"batch {best.batch_size} × {best.length} tokens (peak {gib(best.peak)})"
    )
    kinds = list(dict.fromkeys((fit.base, fit.checkpointing) for fit in sorted(results, key=lambda f: f.base == "nf4")))
    length = max(fit.length for fit in results)
    what = "largest rank" if by_rank else f"largest batch of {length:,} tokens (× length where only shorter ones fit)"
    title = f"{what}; ckpt: gradient checkpointing"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for kind, checkpointing in kinds:
        table.add_column(f"{kind}\nckpt" if checkpointing else kind, justify="right", no_wrap=True)
    names = dict.fromkeys((fit.method, None if by_rank else fit.size) for fit in results)
    for name, size in names:
        fits_of = [fit for fit in results if fit.method == name and (by_rank or fit.size == size)]
        cells = {(fit.base, fit.checkpointing): fit_text(fit, by_rank, length) for fit in fits_of}
        table.add_row(f"{name}, r = {size}" if size else name, *(cells.get(kind, "") for kind in kinds))
    console.print(table)


def fit_text(fit: Fit, by_rank: bool, length: int) -> str:
    """Return the largest rank or batch as text, with its length where that is not the one asked for."""
    if fit.peak is None:
        return "-"
    return str(fit.size) if by_rank else f"{fit.batch_size}" + (f" × {fit.length}" if fit.length < length else "")


def write_plan(rows: Sequence[Row | Fit], as_json: str | None, as_csv: str | None) -> None:
    """Write the rows as JSON, as CSV, or both."""
    records = [row.record() for row in rows]
    if as_json:
        write_text(Path(as_json), json.dumps(records, indent=1) + "\n")
    if as_csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]) if records else [])
        writer.writeheader()
        writer.writerows(records)
        write_text(Path(as_csv), text.getvalue())
