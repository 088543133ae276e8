"""`inlay compare`, `inlay tune` and `inlay ui`."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from inlay.cli.parser import add_fields, positive, whole_number
from inlay.messages import Terminal

OF_DATA = ["data", "model", "task", "columns", "batch_size", "max_length", "eval_size", "target_modules", "dtype"]
OF_TRIALS = [*OF_DATA, "method", "r", "learning_rate", "steps", "epochs", "seed"]
SEARCH = "tune: {space: {learning_rate: {low: 1e-4, high: 1e-2, log: true}}}"


def compare_command(options: argparse.Namespace) -> None:
    """Compare methods on one task under one budget, each at its own learning rate, over several seeds.

    A recipe says under `compare:` which methods, rates, seeds and budget. Without a recipe, --data and --minutes choose
    them. Flags override the recipe. The same command resumes a comparison that was stopped.

    example:  inlay compare recipes/compare_e2e_small.yaml --output runs/compare
              inlay compare --data mine.jsonl --minutes 30
    """
    from inlay.experiments.compare.compare import compare
    from inlay.messages import quiet

    quiet()
    given = fields_given(options, OF_DATA)
    if options.recipe is None:
        if "data" not in given or options.minutes is None:
            raise ValueError("give a recipe, or --data and --minutes: inlay compare --data mine.jsonl --minutes 30")
        if options.jobs is not None or options.ray is not None:
            raise ValueError("--jobs and --ray are for a recipe: --minutes counts on one run at a time")
        from inlay.experiments.compare.in_minutes import compare_in_minutes
        from inlay.recipe.reading import from_values

        recipe = from_values({**given, "output": options.output, "overwrite": options.overwrite}, {})
        compare_in_minutes(recipe, options.minutes, Terminal())
        return
    if options.minutes is not None:
        raise ValueError(
            "--minutes is for a comparison without a recipe; with one, write in it compare: {budget: {time: SECONDS}}, "
            "for each run"
        )
    compare(options.recipe, options.jobs, options.output, options.overwrite, Terminal(), cluster(options), given)


def compare_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay compare`."""
    verb.add_argument("recipe", nargs="?", help="YAML file: what all runs share, and under compare what differs")
    verb.add_argument("--minutes", type=positive, help="without a recipe: choose methods, steps and seeds for so long")
    add_fields(verb, OF_DATA)
    verb.add_argument("--jobs", type=int, help="runs at a time (default 1, seconds then say less; with --ray: all)")
    add_cluster(verb)
    verb.add_argument("--output", help="folder (default: the recipe's output, or runs/<name of the recipe>)")
    verb.add_argument("--overwrite", action="store_true", help="replace another comparison that is there")


def tune_command(options: argparse.Namespace) -> None:
    """Search the fields of a recipe for the least loss, and evaluate the best few again.

    A recipe says under `tune:` what is searched, and may name your own metric; flags override its other fields. The
    result is best.yaml. The same command resumes a search that was stopped.

    example:  inlay tune recipes/tune_e2e_small.yaml --jobs 2 --output runs/tune
    """
    from inlay.experiments.tune.search import tune
    from inlay.messages import quiet

    quiet()
    if options.recipe is None:
        flags = [f"--{name.replace('_', '-')} {shlex.quote(str(vars(options)[name]))}" for name in OF_TRIALS
                 if name in options]  # fmt: skip
        raise ValueError(
            f"a file says what is searched: echo '{SEARCH}' > tune.yaml && {' '.join(['inlay tune tune.yaml', *flags])}"
        )
    given = fields_given(options, OF_TRIALS)
    tune(options.recipe, options.jobs, options.output, options.overwrite, Terminal(), cluster(options), given)


def tune_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay tune`."""
    verb.add_argument("recipe", nargs="?", help="YAML file: what all trials share, and under tune what is searched")
    add_fields(verb, OF_TRIALS)
    verb.add_argument("--jobs", type=int, help="trials at a time (default 1; with --ray: as many as it has room for)")
    add_cluster(verb)
    verb.add_argument("--output", help="folder (default: the recipe's output, or runs/<name of the recipe>)")
    verb.add_argument("--overwrite", action="store_true", help="replace another search that is there")


def fields_given(options: argparse.Namespace, names: list[str]) -> dict[str, object]:
    """Return the fields of a recipe and hyperparameters, of those called `names`, that were given as flags."""
    from inlay.recipe.reading import from_flag

    return {name: from_flag(name, value) for name, value in vars(options).items() if name in names}


def cluster(options: argparse.Namespace) -> Any:
    """Return the Ray cluster that trials run on, if one is requested.

    Raises:
        ValueError: there is none, and yet it is said what a trial gets of it.
    """
    from inlay.experiments.ray_cluster import Cluster

    if options.ray is None:
        if options.cpus is not None or options.gpus is not None:
            raise ValueError("--cpus and --gpus say what a trial gets of a Ray cluster; give --ray too")
        return None
    return Cluster(options.ray, options.cpus or 1, options.gpus)


def ui_command(options: argparse.Namespace) -> None:
    """Show running and finished runs in one page on this machine (TensorBoard on 127.0.0.1).

    example:  inlay ui runs
    """
    from inlay.training.live_page import serve

    serve(options.runs, options.port, Terminal())


def ui_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay ui`."""
    verb.add_argument("runs", help="folder with runs, at any depth")
    verb.add_argument("--port", type=int, default=6006, help="port of the page (default 6006; 0 takes a free one)")


def add_cluster(verb: argparse.ArgumentParser) -> None:
    """Add the flags that say where trials run, and with what."""
    verb.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="run them on a Ray cluster (none: here)")
    verb.add_argument("--cpus", type=whole_number, help="cores of a trial there (default 1)")
    verb.add_argument(
        "--gpus", type=positive, help="GPUs of a trial there, or a part of one (default 1, if it has any)"
    )
