"""`inlay train`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from inlay.cli.flags import recipe_flags, table
from inlay.cli.parser import COMMON, HelpAll, Parser, add_fields, add_learned, whole_number
from inlay.messages import Terminal, show_text


def train_command(options: argparse.Namespace) -> None:
    """Fine-tune a model. Without arguments, SmolLM2-135M-Instruct learns a slice of E2E NLG.

    example:  inlay train --data mine.jsonl --method milora --r 32 --learning-rate 3e-4 --output runs/mine
    """
    from inlay.files.fetched import fetch
    from inlay.host import distributed
    from inlay.messages import quiet
    from inlay.recipe.reading import from_flag, load_recipe
    from inlay.training.dry_run import dry_run
    from inlay.training.freed_memory import keep_freed_memory
    from inlay.training.launch import end_with_launcher, launch
    from inlay.training.train import train, unfinished

    quiet()
    own = (
        "verb",
        "run",
        "recipe",
        "dry_run",
        "verbose",
        "resume",
        "num_processes",
        "launch_config",
        "arguments",
        "from_url",
    )
    given = {k: v for k, v in vars(options).items() if k not in own}
    flags = {k: from_flag(k, v) if isinstance(v, str) else v for k, v in given.items()}
    console = Terminal()
    if options.resume:
        if options.recipe or options.dry_run:
            raise ValueError("--resume RUN goes on with the recipe in the run folder; leave out RECIPE and --dry-run")
        resolved = unfinished(Path(options.resume), flags)
    elif options.from_url:
        with tempfile.TemporaryDirectory() as folder:
            file, digest = fetch(options.recipe or "", Path(folder))
            resolved = load_recipe(str(file), flags, follow=False)
            show_text(f"recipe {options.recipe}: sha256 {digest}", to_stderr=True)
    else:
        resolved = load_recipe(options.recipe, flags)
    if resolved is None:
        show_text(f"{options.resume} is finished")
    elif options.dry_run:
        dry_run(resolved, console, options.verbose)
    elif options.num_processes > 1:
        raise SystemExit(launch(options.arguments, options.num_processes, options.launch_config))
    elif options.launch_config:
        raise ValueError("--launch-config is for several processes; give --num-processes too")
    else:
        end_with_launcher()
        keep_freed_memory()
        with distributed.joined_processes():
            train(resolved, console, resume=bool(options.resume))


def train_arguments(verb: Parser) -> None:
    """Add every recipe field and every hyperparameter as a flag; help shows the common ones and where the rest is."""
    verb.add_argument("recipe", nargs="?", help="YAML file (--from-url: https://...); flags override")
    verb.add_argument("--from-url", action="store_true", help=argparse.SUPPRESS)
    verb.add_argument("--resume", metavar="RUN", help="resume a run folder from its last checkpoint")
    verb.add_argument("--dry-run", action="store_true", help="show tokens, steps, memory, first example, recipe; stop")
    verb.add_argument("--verbose", action="store_true", help="with --dry-run: every field of the recipe")
    add_fields(verb, COMMON)
    rest = [name for name in table() if name not in COMMON]
    add_fields(verb, rest, hidden=True)
    verb.add_argument(
        "--num-processes", type=whole_number, default=1, metavar="N", help="GPUs (or processes) to train on together"
    )
    verb.add_argument(
        "--launch-config", metavar="FILE", help="accelerate's, as recipes/distributed/fsdp2.yaml (default: DDP)"
    )
    add_learned(verb)
    text = f"show all {len(recipe_flags())} fields with their defaults, and stop"
    verb.add_argument("--help-all", action=HelpAll, nargs=0, default=argparse.SUPPRESS, help=text)
