"""The argument parser of all verbs: flags from recipe fields, errors on one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

COMMON = """data output method r scale target_modules learning_rate steps epochs batch_size max_length dtype
eval_size gradient_checkpointing seed samples model overwrite""".split()
WHAT_AND_WHERE = """method r bond cores init scale args target_modules exclude_modules layers_to_transform patterns
revision trust_remote_code""".split()
SCALE = "strength of the adapter: 0 is the base, 1 (default) as it was trained"
OUT_OF_MEMORY = """out of memory. What helps, most first: --batch-size auto (or a smaller one, with --accumulation to
make up for it), --gradient-checkpointing true, a smaller --max-length, --dtype bfloat16, a model quantised to 4 bits;
inlay train --dry-run counts what a setting needs"""


class Help(argparse.RawDescriptionHelpFormatter):
    """Format help with a line per flag, on one screen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=110)


class Parser(argparse.ArgumentParser):
    """Report a mistake on one line with exit code 2, and accept no abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see {self.prog} --help")


def fail(message: str, code: int = 2) -> NoReturn:
    """End with the user's mistake on one line, in which nothing steers the terminal, and an exit `code`."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"inlay: {line}", file=sys.stderr)
    raise SystemExit(code)


def whole_numbers(flag: str, text: str) -> list[int]:
    """Parse whole numbers from 1 up, separated by commas."""
    try:
        return [whole_number(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{flag}: {error}; several go with commas, as in {flag} 8,16") from None


def whole_number(text: str) -> int:
    """Parse a whole number from 1 up."""
    if not text.isdecimal() or len(text) > 9 or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def add_verb(verbs: Any, function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    """Add a subcommand: `NAME_command` is the verb NAME, and its docstring is the help."""
    text, _, example = (function.__doc__ or "").partition("example:")
    verb = verbs.add_parser(
        function.__name__.removesuffix("_command"),
        help=text.split(".")[0],
        description=text.strip(),
        epilog=f"example: {example.rstrip()}",
    )
    verb.set_defaults(run=function)
    return verb


def add_fields(verb: argparse.ArgumentParser, names: Sequence[str], hidden: bool = False) -> None:
    """Add recipe fields and hyperparameters as flags."""
    from inlay.recipe.reading import hyperparameters
    from inlay.recipe.recipe import Recipe

    texts = {**{f.name: f.metadata["help"] for f in fields(Recipe)}, **hyperparameters()}
    for name in names:
        kind = {"metavar": "VALUE", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS if hidden else texts[name]}
        switch = {"nargs": "?", "const": True} if name in SWITCHES else {}
        verb.add_argument(f"--{name.replace('_', '-')}", dest=name, **kind, **switch)


SWITCHES = (
    "overwrite", "packing", "group_by_length", "streaming", "keep_best", "gradient_checkpointing", "trust_remote_code",
)  # fmt: skip


def wrap(text: str) -> str:
    """Wrap words into lines of a screen."""
    import textwrap

    return textwrap.fill(text, 108, break_on_hyphens=False, initial_indent="  ", subsequent_indent="  ")


def terminal() -> Any:
    """Return the console that people read."""
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
