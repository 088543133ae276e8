"""`inlay methods`: all methods in a table, or one in full."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from inlay.cli.parser import whole_number
from inlay.messages import Terminal, show_json, show_text

if TYPE_CHECKING:
    from inlay.method import Method
    from inlay.models.base import BaseModel


def methods_command(options: argparse.Namespace) -> None:
    """List the methods, each with its equation, its paper, and how many parameters it trains; or show one in full.

    example:  inlay methods --model meta-llama/Llama-3.2-1B --r 32
              inlay methods pissa
    """
    from inlay.cli.citations import bibtex
    from inlay.messages import quiet
    from inlay.methods import every, find
    from inlay.models.base import BaseModel

    listed = every() if options.name is None else (find(options.name),)
    if options.bibtex:
        entries = bibtex(every(), only=options.name)
        if options.name and not entries:
            raise ValueError(
                f"{options.name}: its paper has no arXiv number, of which BibTeX is made: {listed[0].paper}"
            )
        show_text(entries)
        return
    quiet()
    base: BaseModel | None = BaseModel(options.model or "builtin")
    caption = f"parameters: {base.name}, r = {options.r} where there is one, all linear layers"
    try:
        base.config()
    except ValueError as error:
        if options.model:
            raise
        base, caption = None, f"no parameter counts: {error}"
    if options.json:
        if base is None:
            show_text(f"note: {caption}", to_stderr=True)
        name = options.model or "builtin"
        show_json({"model": name, "r": options.r, "methods": [method_row(m, base, options.r) for m in listed]})
    elif options.name is None:
        show_table(listed, base, options.r, caption)
    else:
        show_method(listed[0], base, options.r, caption)


def methods_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay methods`."""
    verb.add_argument("name", nargs="?", help="show this method in full, with its hyperparameters (default: list all)")
    verb.add_argument("--model", help="count its parameters: hub id, folder or builtin (default)")
    verb.add_argument("--r", type=whole_number, default=16, help="rank or block size for the counts (default 16)")
    verb.add_argument("--bibtex", action="store_true", help="print the papers as BibTeX instead")
    verb.add_argument("--json", action="store_true", help="print JSON instead")


def show_table(listed: Sequence[type[Method]], base: BaseModel | None, r: int, caption: str) -> None:
    """Print a row for each method, and where those are from that are not Inlay's own."""
    from rich.table import Table

    from inlay.outside import named_origin, origin_of
    from inlay.recipe.rates import default_rate

    table = Table(title=caption, title_justify="left")
    for column in ("method", "equation", "trains", "parameters", "rate", "paper"):
        table.add_column(column, no_wrap=column in ("method", "parameters", "rate"), justify="left")
    for method in listed:
        numbers = "" if base is None else count(method, base, r)
        rate = f"{default_rate(method.name).value:g}"
        table.add_row(method.name, method.equation, method.trains, numbers, rate, method.paper)
    Terminal().print(table)
    for method in listed:
        if origin_of(method):
            show_text(f"{method.name} is from {named_origin(method)}")


def show_method(method: type[Method], base: BaseModel | None, r: int, caption: str) -> None:
    """Print all that a method's class says, and its hyperparameters with their defaults."""
    from rich.table import Table

    from inlay.outside import named_origin, origin_of
    from inlay.recipe.rates import default_rate

    rate = default_rate(method.name)
    table = Table(title=f"{method.name}: {method.title}", title_justify="left", show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column()
    facts = {"equation": method.equation, "trains": method.trains, "paper": method.paper, **abilities(method)}
    facts["learning rate"] = f"{rate.value:g} unless you give another ({rate.origin})"
    if base is not None:
        facts["parameters"] = f"{count(method, base, r)} ({caption.removeprefix('parameters: ')})"
    if origin_of(method):
        facts["defined in"] = named_origin(method)
    for name, text in facts.items():
        table.add_row(name, text)
    console = Terminal()
    console.print(table)
    if base is None:
        show_text(caption)
    table = Table(title="hyperparameters", title_justify="left")
    for column in ("flag", "default", "what it is"):
        table.add_column(column, no_wrap=column != "what it is")
    for name, about in described_fields(method).items():
        default = "" if about["default"] is None else str(about["default"])
        table.add_row(f"--{name.replace('_', '-')}", default, about["help"])
    console.print(table)
    example = f"--import {method.__module__} " if origin_of(method) else ""
    show_text(f"inlay train --data mine.jsonl {example}--method {method.name}")


def abilities(method: type[Method]) -> dict[str, str]:
    """Return what a method at its defaults does where methods differ, in words."""
    from inlay.method import LowRank, Method

    made = method()
    start = "away from the pretrained model, as its paper means it" if made.departs else "at the pretrained model"
    if not made.linear:
        merge = export = "no: its change depends on the input"
    else:
        merge = "yes"
        exact = issubclass(method, LowRank) and not made.shifts
        export = "exact" if exact else "not exact; inlay export reports the error"
    moves = method.schedule is not Method.schedule or method.restart is not Method.restart
    return {
        "starts": start if made.needs is None else f"{start}, from {made.needs} of a few batches",
        "merges": merge,
        "export as a LoRA": export,
        "while training": "what is trained changes (inlay.step in a loop of your own)" if moves else "nothing changes",
    }


def described_fields(method: type[Method]) -> dict[str, dict[str, Any]]:
    """Return the hyperparameters of a method, its own before those of all, each with its default and what it is."""
    from inlay.method import Method

    made, shared = method(), {f.name for f in fields(Method)}
    in_order = sorted(fields(method), key=lambda f: f.name in shared)
    return {f.name: {"default": vars(made)[f.name], "help": f.metadata["help"]} for f in in_order}


def method_row(method: type[Method], base: BaseModel | None, r: int) -> dict[str, object]:
    """Return what JSON says of a method; `base` is the model that its parameters are counted for, if any."""
    from inlay.outside import origin_of
    from inlay.recipe.rates import default_rate

    numbers = count(method, base, r) if base is not None else ""
    digits = numbers.replace(",", "")
    about = {"name": method.name, "title": method.title, "equation": method.equation, "trains": method.trains}
    counted = {"parameters": int(digits) if digits.isdecimal() else None}
    why = {} if digits.isdecimal() or not numbers else {"note": numbers}
    rate = {"learning_rate": default_rate(method.name).value}
    origin = origin_of(method)
    where = {} if origin is None else {"defined_in": origin}
    return {**about, **counted, **why, **rate, "paper": method.paper, "args": described_fields(method), **where}


def count(method: type[Method], base: BaseModel, r: int) -> str:
    """Count the parameters that a method trains on a base model, as text; or say why there is no such number."""
    from inlay.host.config import InlayConfig
    from inlay.models.sizes import count_parameters

    args = {"r": r} if any(f.name == "r" for f in fields(method)) else {}
    config = InlayConfig(method=method.name, args=args, target_modules="all-linear")
    try:
        return f"{count_parameters(base, config):,}"
    except ValueError as error:
        return str(error).partition(": ")[2] or str(error)
