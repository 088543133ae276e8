"""The argument parser of all verbs: flags from recipe fields, help that fits the screen, errors on one line."""

from __future__ import annotations

import argparse
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from inlay.cli.flags import PLAIN, flag_suggestion, instead_of, learned_flags, names_of, recipe_flags, synonym
from inlay.messages import did_you_mean, one_line, short, show_text

COMMON = """data output method r scale target_modules learning_rate steps epochs batch_size max_length dtype
eval_size gradient_checkpointing seed samples model overwrite""".split()
WHAT_AND_WHERE = """method r bond cores init scale args target_modules exclude_modules layers_to_transform experts
patterns revision trust_remote_code""".split()
SCALE = "strength of the adapter: 0 is the base, 1 (default) as it was trained"
OUT_OF_MEMORY = """out of memory. What helps, most first: --batch-size auto (or a smaller one, with --accumulation to
make up for it), --gradient-checkpointing true, a smaller --max-length, --dtype bfloat16, a model quantised to 4 bits;
inlay train --dry-run counts what a setting needs"""
ARGPARSE = (  # what argparse says of a mistake, and what we say
    (r"^argument (\S+): invalid float value: (.*)", r"\1: \2 is not a number"),
    (r"^argument (\S+): invalid int value: (.*)", r"\1: \2 is not a whole number"),
    (r"^argument (\S+): expected (?:one|at least one) argument", r"\1 needs a value after it"),
    (r"^the following arguments are required: ", "missing: "),
    (r"^argument (-\S+): ", r"\1: "),
)
COLUMN = 27  # where the texts of flags begin
# Fields that hold several things, of which a flag that is given again would drop those that were given first.
SEVERAL = """args chat_template_kwargs columns data exclude_modules experts ignore imports layers_to_transform
modules_to_save optimizer_args patterns reward step_args target_modules trainer""".split()
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\uff0d"  # what editors and web pages make of hyphens


class Parser(argparse.ArgumentParser):
    """Report a mistake on one line with exit code 2, accept no abbreviated flags, and write help for any width."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments: list[argparse.Action] = []
        self.verbs: dict[str, Parser] = {}
        self.siblings: dict[str, Parser] = {}  # of a verb, all of them
        self.example = ""
        super().__init__(*args, **{"allow_abbrev": False, "add_help": False, **kwargs})
        self.add_argument("--help", "-h", action="help", help="show this help and stop")

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an argument, and keep it for the help."""
        self.arguments.append(super().add_argument(*names, **settings))
        return self.arguments[-1]

    def error(self, message: str) -> NoReturn:
        """End with a mistake in the arguments, in our words where argparse's are for programmers."""
        for pattern, words in ARGPARSE:
            message = re.sub(pattern, words, message)
        if message.startswith("missing: ") and self.example:
            fail(f"{message.upper()[9:]} is missing; as in: {self.example.strip().splitlines()[0]}")
        fail(message if message.endswith("?") else f"{message}; see {self.prog} --help")

    def flags(self) -> list[str]:
        """Return the long flags, without their dashes."""
        return [text[2:] for action in self.arguments for text in action.option_strings if text.startswith("--")]

    def spelled(self, arguments: Sequence[str]) -> list[str]:
        """Return arguments with every flag as it is spelled here: --learning_rate is --learning-rate.

        An unknown flag ends the program, with a suggestion.
        """
        if "--" in arguments:
            end = list(arguments).index("--")
            return [*self.spelled(arguments[:end]), *arguments[end:]]
        known = self.flags()
        every = {text for action in self.arguments for text in action.option_strings}
        found = []
        for text in arguments:
            flag, equals, value = text.partition("=")
            if text.startswith(tuple(DASHES)) and (name := flag.lstrip(DASHES + "-").replace("_", "-")) in known:
                self.error(f"{flag!r} begins with a dash that is no hyphen; did you mean --{name}?")
            if re.match("-{1,2}[A-Za-z]", text) and flag not in every:
                name = flag.lstrip("-").replace("_", "-")
                if not (flag.startswith("--") and name in known):
                    if hint := self.hint(name.lower()):
                        fail(f"unknown flag {flag}; {hint}")
                    self.error(f"unknown flag {flag}")
                text = f"--{name}{equals}{value}"
            found.append(text)
        return found

    def hint(self, name: str) -> str:
        """Return the end of the line on the unknown flag `name`: what is meant, what to do, or which command has it."""
        plain = [action for action in self.arguments if not action.option_strings and self.example]
        for names in ({name}, names_of(name)):
            for action in plain:
                if names & set(PLAIN[action.dest].split()):
                    return f"{head(action)} needs no flag, as in {self.example.strip().splitlines()[0]}"
            if (meant := synonym(name, self.flags())) is not None:
                return f"did you mean --{meant}?"
        if says := instead_of(self.prog.split()[-1], name):
            return says
        if others := [verb for verb, own in self.siblings.items() if names_of(name) & set(own.flags())]:
            more = f" and {len(others) - 3} others" if len(others) > 3 else ""
            return f"it is for inlay {', '.join(others[:3])}{more}; see {self.prog} --help"
        return flag_suggestion(name, self.flags())

    def unknown(self, arguments: Sequence[str]) -> bool:
        """Return whether a verb has a flag among its `arguments` that is not known here, or wants help on all flags."""
        verb, rest = self.split_verb(arguments)
        before = rest[: rest.index("--")] if "--" in rest else rest
        return verb is not None and any(
            text == "--help-all" or (text.startswith("--") and verb.action_of(text) is None) for text in before
        )

    def split_verb(self, arguments: Sequence[str]) -> tuple[Parser | None, list[str]]:
        """Return the parser of the verb that is named in `arguments`, if any, and what follows it."""
        i = next((i for i, text in enumerate(arguments) if not text.startswith("-")), len(arguments))
        return self.verbs.get(arguments[i] if i < len(arguments) else ""), list(arguments[i + 1 :])

    def action_of(self, text: str) -> argparse.Action | None:
        """Return the argument whose flag `text` is, in any spelling, with or without a value."""
        name = text.partition("=")[0]
        name = name if not name.startswith("--") else f"--{name[2:].replace('_', '-')}"
        return next((action for action in self.arguments if name in action.option_strings), None)

    def first_value(self, arguments: Sequence[str]) -> str | None:
        """Return the first of `arguments` that is no flag and follows none that takes a value, known or not."""
        takes = False
        for text in arguments:
            if text.startswith("-") and not takes:
                action = self.action_of(text)
                takes = "=" not in text and not (action is not None and action.nargs == 0)
            elif not takes:
                return text
            else:
                takes = False
        return None

    def parse_arguments(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse a verb and its arguments."""
        verb = next((i for i, text in enumerate(arguments) if not text.startswith("-")), None)
        if verb is None:
            return self.parse_args(self.spelled(arguments))
        name = arguments[verb]
        if name not in self.verbs:
            self.error(f"invalid choice {name!r}: {did_you_mean(name, self.verbs)}")
        before, after = arguments[:verb], arguments[verb + 1 :]
        return self.parse_args([*self.spelled(before), name, *self.verbs[name].spelled(after)])

    def format_usage(self) -> str:
        """Return the line that says what is given and in which order."""
        given = [f"[{head(a)}]" if a.nargs == "?" else head(a) for a in self.arguments if not a.option_strings]
        return f"usage: {' '.join([self.prog, *(['VERB'] if self.verbs else given), '[--FLAG VALUE ...]'])}\n"

    def format_help(self) -> str:
        """Return the help: usage, what the verb does, verbs or arguments with their defaults, an example."""
        about = (self.description or "").split("\n\n")
        parts = [self.format_usage(), *(line for text in about for line in (paragraph(text), ""))]
        for name, verb in self.verbs.items():
            parts += row(name, first_sentence(verb.description or ""))
        shown = [action for action in self.arguments if action.help != argparse.SUPPRESS]
        for action in sorted(
            shown, key=lambda action: (bool(action.option_strings), "--help" in action.option_strings)
        ):
            parts += row(head(action), described(action))
        if self.epilog:
            parts += ["", paragraph(self.epilog)]
        if self.example:
            parts += ["", "example:", *map(command, self.example.strip().splitlines())]
        return "\n".join(parts) + "\n"


def screen() -> int:
    """Return the columns that help takes: those of the terminal, from 40 to 100."""
    return max(40, min(100, shutil.get_terminal_size().columns))


def paragraph(text: str, indent: int = 0) -> str:
    """Return `text` in lines of the screen, broken only between words."""
    width = screen() - 1 - indent
    return textwrap.fill(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


def row(name: str, text: str) -> list[str]:
    """Return the lines of a table with the column of texts beside the names."""
    lines = paragraph(text, COLUMN).splitlines()
    if len(name) + 3 > COLUMN:
        lines = ["", *lines]
    return [f"  {name if i == 0 else '':<{COLUMN - 2}}{line}".rstrip() for i, line in enumerate(lines or [""])]


def command(text: str) -> str:
    """Return a command in lines of the screen that a shell reads as one."""
    lines = paragraph(text, 6).splitlines()
    return " \\\n".join(f"  {'  ' if i else ''}{line}" for i, line in enumerate(lines))


def head(action: argparse.Action) -> str:
    """Return how an argument is written: its flags and what follows them."""
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return value
    value = "" if action.nargs == 0 or not value else f" [{value}]" if action.nargs == "?" else f" {value}"
    return ", ".join(action.option_strings) + value


def described(action: argparse.Action) -> str:
    """Return the help of an argument with its choices and its default."""
    text = action.help or ""
    choices = ", ".join(map(str, action.choices or ()))
    if choices and not all(str(choice) in text for choice in action.choices or ()):
        text = f"{text}; one of {choices}" if text else f"one of {choices}"
    plain = action.default not in (None, False, argparse.SUPPRESS, [])
    return f"{text} (default {action.default})" if plain and "default" not in text else text


def first_sentence(text: str) -> str:
    """Return the first sentence of `text`, whose end is a period before a space or at the end."""
    return re.split(r"(?<=\.)\s", text.strip(), maxsplit=1)[0]


def fail(message: str, code: int = 2) -> NoReturn:
    """End with the user's mistake on one line, and an exit `code`."""
    show_text(f"inlay: {one_line(message)}", to_stderr=True)
    raise SystemExit(code)


def whole_numbers(flag: str, text: str) -> list[int]:
    """Parse whole numbers from 1 up, separated by commas."""
    try:
        return [whole_number(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{flag}: {error}; several go with commas, as in {flag} 8,16") from None


def positive(text: str) -> float:
    """Parse a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def whole_number(text: str) -> int:
    """Parse a whole number from 1 up."""
    if not text.isdecimal() or len(text) > 9 or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def add_verb(top: Parser, verbs: Any, function: Callable[[argparse.Namespace], None]) -> Parser:
    """Add a subcommand: `NAME_command` is the verb NAME, and its docstring is the help."""
    text, _, example = (function.__doc__ or "").partition("example:")
    name = function.__name__.removesuffix("_command")
    verb = top.verbs[name] = verbs.add_parser(name, description=textwrap.dedent(text).strip())
    verb.example = example
    verb.siblings = top.verbs
    verb.set_defaults(run=function)
    return verb


def add_import(verb: Parser) -> None:
    """Add the flag that names modules with methods outside the package."""
    verb.add_argument(
        "--import", action="append", default=[], dest="imports", metavar="MODULE",
        help="module or file with methods of your own (repeatable)",
    )  # fmt: skip


def add_fields(verb: argparse.ArgumentParser, names: Sequence[str], hidden: bool = False) -> None:
    """Add recipe fields and hyperparameters as flags."""
    for name in names:
        flag = recipe_flags()[name]
        text = argparse.SUPPRESS if hidden else flag_help(name)
        option: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text, "metavar": "VALUE"}
        if flag.switch:
            option |= {"nargs": "?", "const": True, "metavar": ""}
        if name in SEVERAL:
            option["action"] = GivenOnce
        verb.add_argument(f"--{name.replace('_', '-')}", **option)


def add_learned(verb: Parser) -> None:
    """Add the hyperparameters of methods outside the package as flags, but for what the verb calls so itself.

    Those go under `args`.
    """
    taken = {action.dest for action in verb.arguments} | {"verb", "run", "arguments", "imports"}
    add_fields(verb, [name for name in learned_flags() if name not in taken], hidden=True)


def flag_help(name: str) -> str:
    """Return the help of a recipe field or hyperparameter, with its default."""
    flag = recipe_flags()[name]
    return flag.help if flag.default is None or "default" in flag.help else f"{flag.help} (default {flag.default})"


class GivenOnce(argparse.Action):
    """Take a flag that holds several things once: given again, it would drop what was given first."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: object) -> None:
        before = vars(namespace).get(self.dest, values)
        if before != values:
            flag = self.option_strings[0]
            given = f"{short(before)} and {short(values)}"
            parser.error(f"{flag} is given twice, as {given}; one {flag} takes all of it, in [] or {{}}")
        setattr(namespace, self.dest, values)


class HelpAll(argparse.Action):
    """Show every field of a recipe and every hyperparameter with its default, and stop."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for name in recipe_flags():
            show_text("\n".join(row(f"--{name.replace('_', '-')}", flag_help(name))))
        parser.exit()
