"""`inlay inspect` and `inlay plan`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from inlay.cli.parser import WHAT_AND_WHERE, Parser, add_fields, add_learned, positive, whole_number, whole_numbers
from inlay.messages import Terminal, progress_bars, show_json, show_text

if TYPE_CHECKING:
    from rich.console import Console

    from inlay.planning.table import Fit, Row


def inspect_command(options: argparse.Namespace) -> None:
    """Show what an adapter changed of its base; or, for a model, its spectra, ranks and a suggested method.

    example:  inlay inspect builtin --method pissa --r 16 --output spectra
              inlay inspect runs/mine --output changes
    """
    from inlay.inspection.changes import changes_as_data
    from inlay.inspection.inspect_adapter import inspect_adapter, is_adapter, show_changes
    from inlay.inspection.inspect_model import inspect, inspection_as_data, show_inspection
    from inlay.inspection.joint_factors import inspect_joint, joint_as_data, show_joint
    from inlay.messages import quiet
    from inlay.recipe.reading import from_flag

    quiet()
    given = {k: v for k, v in vars(options).items() if k not in ("verb", "run", "json")}
    as_json = "json" in vars(options)
    if "layers" in given:
        given["layers"] = from_flag("layers_to_transform", given["layers"])
    if is_adapter(options.model):
        if wrong := sorted(given.keys() & {"method", "r", "direction", "target_modules", "experts", "joint"}):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
            raise ValueError(f"{options.model} is an adapter, and {flags} is asked of a model; leave it out")
        name, base = given.pop("model"), given.pop("base", None)
        changed = inspect_adapter(name, model=base, **given)
        if as_json:
            show_json(changes_as_data(changed))
        else:
            show_changes(changed, name, Terminal())
    elif "base" in given:
        raise ValueError(f"{options.model} is a model, and --base is of an adapter; leave it out")
    else:
        given |= {name: from_flag(name, given[name]) for name in given.keys() & {"target_modules", "experts"}}
        if given.pop("joint", False):
            if wrong := sorted(given.keys() & {"method", "direction", "experts"}):
                flags = ", ".join(f"--{name}" for name in wrong)
                raise ValueError(f"--joint allocates no ranks, which {flags} is for; leave out one of the two")
            groups = inspect_joint(**given)
            if as_json:
                show_json(joint_as_data(options.model, given.get("r", 16), groups))
            else:
                show_joint(groups, given.get("r", 16), Terminal())
        else:
            found = inspect(**given)
            if as_json:
                show_json(inspection_as_data(found))
            else:
                show_inspection(found, Terminal())
    if "output" in given:
        show_text(f"written to {options.output}", to_stderr=as_json)


def inspect_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay inspect`."""
    verb.argument_default = argparse.SUPPRESS  # what is not given is not asked of an adapter
    verb.add_argument("model", nargs="?", default="builtin", help="model (hub id, folder, builtin) or adapter (or run)")
    verb.add_argument("--base", help="base model of an adapter (default: the one it names)")
    verb.add_argument("--method", help="for a model: the method whose parameters are counted (default lamda)")
    verb.add_argument("--r", type=int, help="for a model: the rank whose parameters are the budget (default 16)")
    verb.add_argument("--direction", choices=("flat", "peaked"), help="for a model: which spectra get the higher ranks")
    verb.add_argument("--target-modules", help="for a model: names, a regex, or all-linear (default)")
    verb.add_argument("--layers", help="layer indices, as 0,1,2 (of a model with names in --target-modules)")
    verb.add_argument("--experts", help="for a model: a mixture's experts too: true, or {layers.0.mlp.experts: [0, 3]}")
    verb.add_argument(
        "--joint", action="store_true", help="for a model: how much one right factor carries of layers with one input"
    )
    verb.add_argument("--output", help="folder for JSON, ranks.yaml (of a model) and plots (default: print only)")
    verb.add_argument("--overwrite", action="store_true", help="replace such a folder")
    verb.add_argument("--json", action="store_true", help="print JSON in place of tables")
    verb.add_argument("--revision", help="revision of a hub model")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")


def plan_command(options: argparse.Namespace) -> None:
    """Predict the memory, time and file size of every method; with --fits, what fits into a GPU.

    This needs the model's configuration and no weights. With --fits and --batch-size, it looks for the largest rank.

    example:  inlay plan meta-llama/Llama-3.1-8B --length 2048 --fits 24
    """
    from inlay.messages import quiet
    from inlay.models.base import BaseModel
    from inlay.models.loading import DTYPES
    from inlay.models.sizes import frozen_experts
    from inlay.planning.planner import NotPlannedError, PlannedRun
    from inlay.planning.table import SHARE, candidates, fits, plan_rows, show_fits, show_plan, widths, write_plan
    from inlay.recipe.reading import from_flag

    quiet()
    own = ("verb", "run", "model", "batch_size", "length", "labelled", "fits", "dtype", "device", "r", "json", "csv")
    flags = {k: from_flag(k, v) if isinstance(v, str) else v for k, v in vars(options).items() if k not in own}
    to_stdout = options.json == "-"
    for path in filter(None, (None if to_stdout else options.json, options.csv)):  # before a minute is spent
        if not Path(path).parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {Path(path).parent}")
    if not 0 < options.labelled <= 1:
        raise ValueError(f"--labelled {options.labelled} is no share of the tokens; give one above 0 and up to 1")
    made = candidates(flags, [None] if options.r is None else whole_numbers("--r", options.r))
    base = BaseModel(options.model, trust_remote_code=bool(flags.get("trust_remote_code")))
    of = PlannedRun(base, None, DTYPES[options.dtype], device=options.device, labelled=options.labelled)
    notes: list[str] = []
    found: Sequence[Row | Fit] = ()
    if not flags.get("experts") and (line := frozen_experts(of.blank().requires_grad_(False))):
        notes.append(line)
    console = Terminal(stderr=to_stdout)
    kinds = widths(("none", "nf4") if options.fits is None else ("none", "int8", "nf4"), notes)
    total = 2 * (len(kinds) * len(made[:-1]) + 1)
    try:
        if options.fits is None:
            with counted(console, total) as done:
                rows = plan_rows(of, made, kinds, options.batch_size or 4, options.length, notes, done)
            if not to_stdout:
                show_plan(rows, console, options.labelled)
            found = rows
        else:
            budget = SHARE * options.fits * 2**30
            with counted(console, total) as done:
                largest = fits(of, made, kinds, budget, options.batch_size, options.length, notes, done)
            if not to_stdout:
                show_fits(largest, options.fits, options.batch_size is not None, console)
            found = largest
    except NotPlannedError as error:
        show_text(f"memory not planned: {error}", to_stderr=to_stdout)
        for name, config in made:
            show_text(f"{name}: {replace(of, config=config).parameters:,} trained parameters", to_stderr=to_stdout)
    for text in notes:
        show_text(f"note: {text}", to_stderr=to_stdout)
    write_plan(found, None if to_stdout else options.json, options.csv)
    if to_stdout:
        show_json([row.record() for row in found])


@contextmanager
def counted(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on a terminal until the block ends, and yield what counts one more of `total`, by its name."""
    from rich.progress import TimeElapsedColumn

    with progress_bars(console, TimeElapsedColumn()) as bars:
        bar = bars.add_task("planning", total=total, now="")
        yield lambda name: bars.update(bar, advance=1, now=name)
        bars.update(bar, visible=False)


def plan_arguments(verb: Parser) -> None:
    """Add the arguments of `inlay plan`."""
    verb.add_argument(
        "model", nargs="?", default="builtin", help="hub id, folder with a config.json, or builtin (default)"
    )
    add_fields(verb, ["method"])
    verb.add_argument("--r", help="rank, block size or bond; several with commas (default: each method's own)")
    verb.add_argument(
        "--batch-size", type=whole_number, help="sequences in a batch (default 4; with --fits, the largest is searched)"
    )
    verb.add_argument("--length", type=whole_number, default=1024, help="tokens of a sequence (default 1024)")
    verb.add_argument(
        "--labelled",
        type=positive,
        default=1.0,
        metavar="SHARE",
        help="share of the tokens that has a label (default 1); the head sees no others",
    )
    verb.add_argument(
        "--fits", type=positive, metavar="GB", help="find the largest run that fits into a GPU with so much memory"
    )
    verb.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the base (default bfloat16)",
    )
    verb.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="device of the run (default cuda)")
    verb.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the rows, in bytes; without FILE: "
                      "print them in place of tables")  # fmt: skip
    verb.add_argument("--csv", metavar="FILE", help="the same as CSV")
    add_fields(verb, [name for name in WHAT_AND_WHERE if name not in ("method", "r", "revision")])
    add_learned(verb)
