"""The command line. A verb is a function: its docstring is its help, its arguments are declared beside it.

Exit codes: 0 done, 2 the user's mistake (one line), 1 ours (a traceback), 130 interrupted (and how to resume), 3 it is
done and saved, and something after that failed, or could not be shown (one line).
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from importlib.metadata import entry_points

from inlay._version import __version__
from inlay.cli.convert import (
    export_arguments,
    export_command,
    fold_arguments,
    fold_command,
    import_arguments,
    import_command,
    merge_arguments,
    merge_command,
)
from inlay.cli.environment import (
    check_text,
    check_variables,
    env_arguments,
    env_command,
    schema_arguments,
    schema_command,
)
from inlay.cli.evaluate import eval_arguments, eval_command, generate_arguments, generate_command
from inlay.cli.experiments import (
    compare_arguments,
    compare_command,
    tune_arguments,
    tune_command,
    ui_arguments,
    ui_command,
)
from inlay.cli.flags import learn_flags
from inlay.cli.inspect import inspect_arguments, inspect_command, plan_arguments, plan_command
from inlay.cli.list_methods import methods_arguments, methods_command
from inlay.cli.parser import OUT_OF_MEMORY, Parser, add_import, add_verb, fail
from inlay.cli.serve import serve_arguments, serve_command
from inlay.cli.streams import Streams
from inlay.cli.train import train_arguments, train_command
from inlay.messages import AfterTrainingError, out_of_memory, quiet_imports, show_text

VERBS = (
    (train_command, train_arguments),
    (compare_command, compare_arguments),
    (tune_command, tune_arguments),
    (ui_command, ui_arguments),
    (methods_command, methods_arguments),
    (eval_command, eval_arguments),
    (generate_command, generate_arguments),
    (serve_command, serve_arguments),
    (fold_command, fold_arguments),
    (export_command, export_arguments),
    (import_command, import_arguments),
    (merge_command, merge_arguments),
    (inspect_command, inspect_arguments),
    (plan_command, plan_arguments),
    (schema_command, schema_arguments),
    (env_command, env_arguments),
)


def main(arguments: list[str] | None = None) -> None:
    """Run a verb; a mistake of the user's is one line and exit code 2."""
    streams = Streams()
    code, ended = 0, False
    try:
        run_verb(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as stop:
        if isinstance(stop.code, str):  # a library's words, which Python prints
            raise
        code, ended = stop.code or 0, True
    except KeyboardInterrupt:
        show_text("inlay: interrupted", to_stderr=True)
        code = 130
    code = streams.exit_code(code)
    if code or ended:
        raise SystemExit(code)


def run_verb(arguments: list[str]) -> None:
    """Run the verb that `arguments` name, with all that is checked before."""
    try:
        check_text(arguments)
        check_variables(trains=arguments[:1] in (["train"], ["compare"], ["tune"]))
    except ValueError as error:
        fail(str(error))
    options = parse_line(arguments)
    modules = vars(options).pop("imports")
    if options.verb == "train":
        options.arguments = arguments  # for the processes that it starts

    try:
        quiet_imports()
        import_all(modules)
        options.run(options)
    except (ValueError, OSError) as error:
        if os.environ.get("INLAY_DEBUG"):
            raise
        fail(str(error), 3 if isinstance(error, AfterTrainingError) else 2)
    except Exception as error:
        from inlay.host.distributed import Elsewhere

        if isinstance(error, Elsewhere):  # which is said there
            raise SystemExit(1) from None
        if not out_of_memory(error):
            raise
        fail(OUT_OF_MEMORY)


def parse_line(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line; a flag that is not known may be of a method outside the package, which is then imported."""
    top = parser()
    if top.unknown(arguments):
        verb, rest = top.split_verb(arguments)
        modules = imports_in(rest)
        recipe = verb.first_value(rest) if verb and verb.prog.split()[-1] in ("train", "compare", "tune") else None
        named = recipe is not None and names_modules(recipe)
        if modules or named or entry_points(group="inlay.methods"):
            try:
                import_all(modules)
                if recipe is not None and named:
                    from inlay.recipe.reading import import_named, read_yaml

                    import_named(read_yaml(recipe), recipe)
                learn_flags()
            except (ValueError, OSError) as error:
                if os.environ.get("INLAY_DEBUG"):
                    raise
                fail(str(error))
            top = parser()
    return top.parse_arguments(arguments)


def imports_in(arguments: list[str]) -> list[str]:
    """Return what follows each `--import`."""
    pairs = itertools.zip_longest(arguments, arguments[1:], fillvalue="")
    return [
        after if text == "--import" else text.removeprefix("--import=")
        for text, after in pairs
        if text == "--import" or text.startswith("--import=")
    ]


def names_modules(recipe: str) -> bool:
    """Return whether a file seems to be a recipe with modules under `import`; reading it as one would import torch."""
    from inlay.files.untrusted import LENGTH, read_regular, user_path

    try:
        text = read_regular(user_path(recipe), LENGTH)
    except (OSError, ValueError):
        return False  # which is reported when it is read for good
    return re.search(r"""^["']?import["']?\s*:""", text, re.MULTILINE) is not None


def import_all(modules: list[str]) -> None:
    """Import the modules of methods that `--import` names."""
    if modules:
        from inlay.methods import import_methods

        for module in modules:
            import_methods(module)


def parser() -> Parser:
    """Build the parser of all verbs with their flags."""
    top = Parser(prog="inlay", description="Fine-tune a large language model by re-cutting its own weights.")
    top.add_argument("--version", action="version", version=f"inlay {__version__}", help="show the version and stop")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for command, arguments in VERBS:
        verb = add_verb(top, verbs, command)
        arguments(verb)
        add_import(verb)
    top.epilog = "inlay VERB --help says more."
    return top
