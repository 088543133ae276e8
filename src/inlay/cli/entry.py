"""The command line. A verb is a function: its docstring is its help, its arguments are declared beside it.

Exit codes: 0 done, 2 the user's mistake (one line), 1 ours (a traceback), 130 interrupted (and how to go on).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from inlay._version import __version__

COMMON = """data output method r scale target_modules learning_rate steps epochs batch_size max_length dtype
eval_size gradient_checkpointing seed samples model overwrite""".split()
WHAT_AND_WHERE = """method r bond cores init scale args target_modules exclude_modules layers_to_transform patterns
revision trust_remote_code""".split()
OUT_OF_MEMORY = """out of memory. What helps, most first: --batch-size auto (or a smaller one, with --accumulation to
make up for it), --gradient-checkpointing true, a smaller --max-length, --dtype bfloat16, a model quantised to 4 bits;
inlay train --dry-run counts what a setting needs"""


class Help(argparse.RawDescriptionHelpFormatter):
    """A line per flag, on one screen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=110)


class Parser(argparse.ArgumentParser):
    """Errors on one line, exit 2, no usage dump; flags are never abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> Any:
        fail(f"{message}; see {self.prog} --help")


def fail(message: str) -> Any:
    """End with the user's mistake on one line, in which nothing steers the terminal."""
    said = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"inlay: {said}", file=sys.stderr)
    raise SystemExit(2)


def train(options: argparse.Namespace) -> None:
    """Fine-tune a model. Without arguments: SmolLM2-135M-Instruct on a slice of E2E NLG.

    example:  inlay train --data mine.jsonl --method milora --r 32 --learning-rate 3e-4 --output runs/mine
    """
    from inlay.host import processes
    from inlay.workbench import launch, models, prepare, recipe, train

    models.quiet()
    own = ("verb", "run", "recipe", "dry_run", "resume", "num_processes", "launch_config", "arguments")
    given = {k: v for k, v in vars(options).items() if k not in own}
    flags = {k: recipe.from_flag(k, v) if isinstance(v, str) else v for k, v in given.items()}
    console = terminal()
    if options.resume:
        if options.recipe or options.dry_run:
            raise ValueError("--resume RUN goes on with the recipe in the run folder; leave out RECIPE and --dry-run")
        resolved = train.unfinished(Path(options.resume), flags)
    else:
        resolved = recipe.load(options.recipe, flags)
    if resolved is None:
        print(f"{options.resume} is finished")
    elif options.dry_run:
        prepare.dry_run(resolved, console)
    elif options.num_processes > 1:
        raise SystemExit(launch.launch(options.arguments, options.num_processes, options.launch_config))
    elif options.launch_config:
        raise ValueError("--launch-config is for several processes; give --num-processes too")
    else:
        with processes.joined():
            train.train(resolved, console, resume=bool(options.resume))


def compare(options: argparse.Namespace) -> None:
    """Compare methods on one task under one budget: each at its own learning rate, over seeds, with a verdict.

    The recipe says under `compare:` which methods, rates, seeds and budget. The same command goes on where it was.

    example:  inlay compare recipes/compare_e2e_small.yaml --output runs/compare
    """
    from inlay.workbench import compare, models

    models.quiet()
    compare.compare(options.recipe, options.jobs, options.output, options.overwrite, terminal(), cluster(options))


def tune(options: argparse.Namespace) -> None:
    """Search the fields of a recipe for the least loss, and judge the best few again, by your own metric if you like.

    The recipe says under `tune:` what is searched. The same command goes on where it was; best.yaml is the result.

    example:  inlay tune recipes/tune_e2e_small.yaml --jobs 2 --output runs/tune
    """
    from inlay.workbench import models, tune

    models.quiet()
    tune.tune(options.recipe, options.jobs, options.output, options.overwrite, terminal(), cluster(options))


def cluster(options: argparse.Namespace) -> Any:
    """The Ray that trials are to run on, if any.

    Raises:
        ValueError: there is none, and yet it is said what a trial gets of it.
    """
    from inlay.workbench.on_ray import Cluster

    if options.ray is None:
        if options.cpus is not None or options.gpus is not None:
            raise ValueError("--cpus and --gpus say what a trial gets of a Ray cluster; give --ray too")
        return None
    return Cluster(options.ray, options.cpus or 1, options.gpus)


def ui(options: argparse.Namespace) -> None:
    """Show running and finished runs, over each other, in a page on this machine (TensorBoard, 127.0.0.1).

    example:  inlay ui runs
    """
    from inlay.workbench import ui

    ui.serve(options.runs, options.port, terminal())


def methods(options: argparse.Namespace) -> None:
    """List the methods: equation, paper, what trains, and how many numbers that is at --r for a model.

    example:  inlay methods --model meta-llama/Llama-3.2-1B --r 32
    """
    from rich.table import Table

    from inlay.methods import METHODS
    from inlay.workbench import models

    models.quiet()
    try:
        models.load_config(options.model or "builtin")
        caption = f"parameters: {options.model or 'builtin'}, r = {options.r} where there is one, all linear layers"
    except ValueError as error:
        if options.model:
            raise
        caption = f"no parameter counts: {error}"
    table = Table(title=caption, title_justify="left")
    for column in ("method", "equation", "trains", "parameters", "paper"):
        table.add_column(column, no_wrap=column in ("method", "parameters"), justify="left")
    for method in METHODS:
        numbers = "" if caption.startswith("no ") else count(method, options)
        table.add_row(method.name, method.equation, method.trains, numbers, method.paper)
    terminal().print(table)


def count(method: Any, options: argparse.Namespace) -> str:
    """A method's trainable numbers on a model, or why there is no such number."""
    from inlay import InlayConfig
    from inlay.workbench import memory

    args = {"r": options.r} if any(f.name == "r" for f in fields(method)) else {}
    config = InlayConfig(method=method.name, args=args, target_modules="all-linear")
    try:
        return f"{memory.count(options.model or 'builtin', config):,}"
    except ValueError as error:
        return str(error).partition(": ")[2] or str(error)


def eval_(options: argparse.Namespace) -> None:
    """Say how well a model, a run or an adapter does a task; with --base, also what the adapter changed.

    example:  inlay eval runs/mine --task commonsense --data boolq/test.json --by likelihood --base
    """
    from inlay.workbench import evaluate as judge
    from inlay.workbench import metric, models

    models.quiet()
    if (options.task is None) == (options.metric is None):
        raise ValueError("--task or --metric says what is asked, one of the two")
    if options.metric:
        run = metric.load(options.metric)
    else:
        flags = {key: getattr(options, key) for key in ("task", "limit", "by", "tokens", "batch_size")}
        run = metric.OnTask(**flags, data=options.data or "").load(terminal())
    dtype, folder = models.dtype_for(options.dtype), None
    hub: Any = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    if (Path(options.model) / "adapter_config.json").is_file() or (Path(options.model) / "adapter").is_dir():
        folder = models.adapter_folder(options.model)
    if folder:
        model, tokenizer = models.load_adapted(folder, None, dtype, **hub)
    else:
        model, tokenizer = models.load_base(options.model, dtype, **hub, auto=models.auto_of(options.model, **hub))
    if (options.base or options.merged) and not folder:
        raise ValueError(f"{options.model} is no adapter: --base and --merged are for one")
    if options.base and options.merged:
        raise ValueError("--merged leaves no base to compare with; leave out one of the two")
    model: Any = model.merge_and_unload() if options.merged else model  # type: ignore[operator]
    data, where = Path(options.data or ""), Path(options.model)
    within = folder not in (None, where) or (where / "recipe.yaml").is_file()
    out = Path(options.output or (where if within else Path()) / "eval")
    how = (options.by if options.by == "likelihood" else "", "merged" if options.merged else "")
    parts = (options.metric or options.task, data.parent.name, data.stem, *how)
    name = "-".join(re.sub(r"\W+", "-", part).strip("-") for part in parts if part)
    about = {key: getattr(options, key) for key in ("model", "data", "by", "limit", "tokens", "merged")}
    about |= {"adapter": folder and str(folder), "dtype": str(dtype).removeprefix("torch.")}
    figures, rows = metric.run(run, model, tokenizer)
    judge.write(out, name, figures, rows, about)
    for figure in figures:
        print(figure)
    if options.base:
        assert folder is not None
        if models.cuts_base(folder):
            del model  # before its base is loaded a second time
            before, its = metric.run(run, models.intact(folder, dtype, **hub), tokenizer)
        else:
            with model.disable_adapter():
                before, its = metric.run(run, model, tokenizer)
        judge.write(out, f"{name}-base", before, its, {**about, "adapter": None})
        for was, now in zip(before, figures, strict=True):
            print(f"base, {was}")
            if found := judge.difference(was, now, its, rows):
                print(f"  the adapter, {now.name}: {found}")
    print(f"written to {out}")


def generate(options: argparse.Namespace) -> None:
    """Answer a prompt with a base model, or with a base and an adapter; without --prompt, converse.

    example:  inlay generate runs/builtin-bone --prompt "name[Blue Spice], eatType[pub], area[riverside]"
    """
    from inlay.workbench import models
    from inlay.workbench.generate import answer

    models.quiet()
    folder = models.adapter_folder(options.adapter) if options.adapter else None
    dtype = models.dtype_for(options.dtype)
    if folder:
        model, tokenizer = models.load_adapted(folder, options.model, dtype)
    else:
        model, tokenizer = models.load_base(options.model or "builtin", dtype)
    model.eval()
    extra = {"do_sample": True, "temperature": options.temperature} if options.temperature > 0 else {}
    chat = [{"role": "system", "content": options.system}] if options.system else []
    if options.prompt is not None:
        print(answer(model, tokenizer, [[*chat, user(options.prompt)]], options.tokens, **extra)[0])
        return
    print("an empty line ends the conversation", file=sys.stderr)
    while line := read_line():
        chat.append(user(line))
        chat.append({"role": "assistant", "content": answer(model, tokenizer, [chat], options.tokens, **extra)[0]})
        print(chat[-1]["content"])


def user(text: str) -> dict[str, str]:
    """A user's turn."""
    return {"role": "user", "content": text}


def read_line() -> str:
    """A line of the conversation; empty at its end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def fold(options: argparse.Namespace) -> None:
    """Cut a method's piece out of a model, quantise the rest to 4 bits, and write both: out/base and out/adapter.

    example:  inlay fold meta-llama/Llama-3.2-1B folded/ --method dota --bond 32
    """
    import statistics

    from rich.table import Table
    from tqdm import tqdm

    from inlay import folding
    from inlay.workbench import memory, models, recipe

    models.quiet()
    rest = ("verb", "run", "model", "out", "overwrite", "rounds")
    flags = {k: recipe.from_flag(k, v) for k, v in vars(options).items() if k not in rest and isinstance(v, str)}
    flags |= {k: v for k, v in vars(options).items() if k not in rest and isinstance(v, bool)}
    asked = recipe.load(None, {**flags, "model": options.model})
    with tqdm(desc="folding", unit="weight", disable=None) as bar:
        made = folding.fold(
            asked.model, options.out, asked.config(), rounds=options.rounds, revision=asked.revision,
            trust_remote_code=asked.trust_remote_code, overwrite=options.overwrite, done=lambda _: bar.update(),
        )  # fmt: skip
    table = Table("weights", "plain NF4", "folded", title="mean ‖W' − W‖ / ‖W‖", title_justify="left")
    groups: dict[str, list] = {}
    for error in made.errors:
        groups.setdefault(error.module.rpartition(".")[2], []).append(error)
    for kind, errors in (*groups.items(), ("all", made.errors)):
        table.add_row(kind, *(f"{statistics.mean(getattr(e, k) for e in errors):.4f}" for k in ("plain", "folded")))
    terminal().print(table)
    size = sum(file.stat().st_size for file in made.base.iterdir())
    print(f"{made.base} ({memory.gib(size)}), {made.adapter}; each weight's error: {made.folder / 'errors.csv'}")


def export(options: argparse.Namespace) -> None:
    """Write an adapter as a plain LoRA: a PEFT folder (vLLM serves it), or GGUF for llama.cpp and Ollama.

    example:  inlay export runs/builtin-bone lora/ --to lora
    """
    from inlay import export
    from inlay.workbench import models

    models.quiet()
    adapters = {options.adapter: options.weight}
    for path, weight in map(weighted, options.add):
        adapters[path] = adapters.get(path, 0.0) + weight
    done = export.export_lora(
        adapters, options.out, to=options.to, rank=options.rank, energy=options.energy, model=options.model,
        dtype=options.dtype, pad=not options.no_pad, overwrite=options.overwrite,
        revision=options.revision, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    for module, error in done.errors.items() if any(e > 1e-5 for e in done.errors.values()) else ():
        print(f"{module}: relative error {error:.2e}")
    worst = max(done.errors.values())
    lost = max(done.rounding.values())
    rounded = f"; rounding to {options.dtype} lost up to {lost:.1e} of a change" if lost else ""
    exact = "exact" if worst < 1e-5 else f"largest relative error {worst:.2e}"
    print(f"{done.folder}: rank {done.rank}, {exact}{rounded}")


def import_(options: argparse.Namespace) -> None:
    """Make a LoRA, MiSS or Bone adapter of PEFT an Inlay adapter with the same outputs.

    example:  inlay import lora/ imported/
    """
    from inlay import importing
    from inlay.workbench import models

    models.quiet()
    given = {k: v for k, v in vars(options).items() if k not in ("verb", "run")}
    done = importing.import_adapter(**given)
    for note in done.notes:
        print(f"note: {note}")
    print(f"{done.folder}: {done.method} on {done.weights} weights")


def weighted(text: str) -> tuple[str, float]:
    """An adapter and its weight, from ADAPTER=WEIGHT."""
    path, _, weight = text.rpartition("=")
    try:
        return path or text, float(weight)
    except ValueError:
        raise ValueError(f"--add {text}: write it as ADAPTER=WEIGHT, as in runs/other=0.5") from None


def merge(options: argparse.Namespace) -> None:
    """Write base + adapter as an ordinary checkpoint, which transformers, vLLM or llama.cpp load without Inlay.

    example:  inlay merge runs/builtin-bone merged/
    """
    from inlay import export
    from inlay.workbench import models

    models.quiet()
    done = export.merge(
        options.adapter, options.out, options.model, options.dtype, options.overwrite,
        to=options.to, shard=options.shard, probe=not options.no_probe,
        revision=options.revision, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    mean, most = sum(done.lost.values()) / max(1, len(done.lost)), max(done.lost.values(), default=0.0)
    print(f"{done.folder}: rounding lost {mean:.1e} of the change of a weight, at most {most:.1e}")
    if mean > 0.1:
        print("note: this dtype is too coarse for so small a change; merge with --dtype float32, or serve the adapter")
    if done.logit_error is not None:
        print(f"largest logit difference to the adapter on a probe batch {done.logit_error:.2e}")


def inspect(options: argparse.Namespace) -> None:
    """Show what an adapter changed of its base; or of a model the spectra, what of them is signal, ranks, a method.

    example:  inlay inspect builtin --method pissa --r 16 --output spectra
              inlay inspect runs/mine --output changes
    """
    from inlay.workbench import inspect, inspect_adapter, models, recipe

    models.quiet()
    given = {k: v for k, v in vars(options).items() if k not in ("verb", "run")}
    if "layers" in given:
        given["layers"] = recipe.from_flag("layers_to_transform", given["layers"])
    if inspect_adapter.is_adapter(options.model):
        if wrong := sorted(given.keys() & {"method", "r", "direction", "target_modules", "joint"}):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
            raise ValueError(f"{options.model} is an adapter, and {flags} is asked of a model; leave it out")
        name, base = given.pop("model"), given.pop("base", None)
        inspect_adapter.show(inspect_adapter.inspect_adapter(name, model=base, **given), name, terminal())
    elif "base" in given:
        raise ValueError(f"{options.model} is a model, and --base is of an adapter; leave it out")
    else:
        if "target_modules" in given:
            given["target_modules"] = recipe.from_flag("target_modules", given["target_modules"])
        if given.pop("joint", False):
            from inlay.workbench import joint

            keys = ("model", "target_modules", "layers", "revision", "trust_remote_code")
            found = joint.joint(**{key: given[key] for key in keys if key in given})
            joint.show(found, given.get("r", 16), terminal())
            return
        inspect.show(inspect.inspect(**given), terminal())
    print(f"written to {options.output}") if "output" in given else None


def plan(options: argparse.Namespace) -> None:
    """Say what every method needs of a model: memory, time, file; or, with --fits, what a GPU has room for.

    From the model's configuration alone. With --fits and --batch-size the largest rank is looked for.

    example:  inlay plan meta-llama/Llama-3.1-8B --length 2048 --fits 24
    """
    from inlay.workbench import models, plan_table, recipe
    from inlay.workbench.plan import Run

    models.quiet()
    own = ("verb", "run", "model", "batch_size", "length", "fits", "dtype", "device", "r", "json", "csv")
    flags = {k: recipe.from_flag(k, v) if isinstance(v, str) else v for k, v in vars(options).items() if k not in own}
    for path in filter(None, (options.json, options.csv)):  # before a minute is spent
        if not Path(path).parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {Path(path).parent}")
    made = plan_table.candidates(flags, whole_numbers("--r", options.r))
    trust = bool(flags.get("trust_remote_code"))
    of = Run(options.model, None, models.DTYPES[options.dtype], device=options.device, trust_remote_code=trust)
    notes: list[str] = []
    if options.fits is None:
        found = plan_table.rows(
            of, made, plan_table.widths(("none", "nf4"), notes), options.batch_size or 4, options.length, notes
        )
        plan_table.show(found, terminal())
    else:
        budget, kinds = plan_table.SHARE * options.fits * 2**30, plan_table.widths(("none", "int8", "nf4"), notes)
        found = plan_table.fits(of, made, kinds, budget, options.batch_size, options.length, notes)
        plan_table.show_fits(found, options.fits, options.batch_size is not None, terminal())
    for text in notes:
        print(f"note: {text}")
    plan_table.write(found, options.json, options.csv)


def whole_numbers(flag: str, text: str) -> list[int]:
    """Numbers from 1 up, from a list with commas."""
    try:
        return [positive(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{flag}: {error}; several go with commas, as in {flag} 8,16") from None


def positive(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or len(text) > 9 or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    """Run a verb; a mistake of the user's is one line and exit code 2."""

    from inlay.host.processes import Elsewhere

    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.verb == "train":
        options.arguments = arguments  # for the processes that it starts
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("inlay: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Elsewhere:  # which is said there
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        if os.environ.get("INLAY_DEBUG"):
            raise
        fail(str(error))
    except Exception as error:
        from inlay.workbench.models import out_of_memory

        if not out_of_memory(error):
            raise
        fail(OUT_OF_MEMORY)


def parser() -> Parser:
    """All verbs with their flags."""
    top = Parser(prog="inlay", description="Fine-tune a large language model by re-cutting its own weights.")
    top.add_argument("--version", action="version", version=f"inlay {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_train(add_verb(verbs, train))

    verb = add_verb(verbs, compare)
    verb.add_argument("recipe", help="YAML file: what all runs share, and under compare what differs")
    verb.add_argument("--jobs", type=int, help="runs at a time (default 1, seconds then say less; with --ray: all)")
    add_cluster(verb)
    verb.add_argument("--output", help="folder (default: the recipe's output, or runs/<name of the recipe>)")
    verb.add_argument("--overwrite", action="store_true", help="replace another comparison that is there")

    verb = add_verb(verbs, tune)
    verb.add_argument("recipe", help="YAML file: what all trials share, and under tune what is searched")
    verb.add_argument("--jobs", type=int, help="trials at a time (default 1; with --ray: as many as it has room for)")
    add_cluster(verb)
    verb.add_argument("--output", help="folder (default: the recipe's output, or runs/<name of the recipe>)")
    verb.add_argument("--overwrite", action="store_true", help="replace another search that is there")

    verb = add_verb(verbs, ui)
    verb.add_argument("runs", help="folder that runs are in, at any depth")
    verb.add_argument("--port", type=int, default=6006, help="of the page (default 6006; 0: any that is free)")

    verb = add_verb(verbs, methods)
    verb.add_argument("--model", help="hub id, folder or builtin (default)")
    verb.add_argument("--r", type=int, default=16, help="rank or block size (default 16)")

    verb = add_verb(verbs, eval_)
    verb.add_argument("model", help="hub id, folder, builtin, run folder or adapter folder")
    verb.add_argument("--task", help="commonsense, gsm8k, exact, text (BLEU, chrF, NIST, ROUGE), classification, "
                      "perplexity, or lm-eval:NAME, also a YAML file or a folder of them")  # fmt: skip
    verb.add_argument("--metric", help="in place of a task: module:function, (model, tokenizer) -> a number")
    verb.add_argument("--data", help="a file or data set, as for train (lm-eval tasks bring theirs)")
    verb.add_argument("--by", choices=("generation", "likelihood"), default="generation", help="how options are chosen")
    verb.add_argument("--base", action="store_true", help="evaluate the base too, and say what the adapter changed")
    verb.add_argument("--merged", action="store_true", help="evaluate the adapter merged into the base")
    verb.add_argument("--limit", type=int, help="the first so many records")
    verb.add_argument("--batch-size", type=int, default=8, help="questions at a time (default 8)")
    verb.add_argument("--tokens", type=int, help="longest answer (default: the task's)")
    verb.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the base")
    verb.add_argument("--output", help="folder (default: eval/ in the run folder, else in this one)")
    verb.add_argument("--revision", help="revision of a hub model (default: the one an adapter was trained on)")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")

    verb = add_verb(verbs, generate)
    verb.add_argument("adapter", nargs="?", help="run folder or adapter folder (none: the base alone)")
    verb.add_argument("--prompt", help="one prompt; without it, converse")
    verb.add_argument("--model", help="base model (default: the adapter's, or builtin)")
    verb.add_argument("--system", help="system message")
    verb.add_argument("--tokens", type=int, default=128, help="at most so many new tokens (default 128)")
    verb.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    verb.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))

    verb = add_verb(verbs, fold)
    verb.add_argument("model", help="hub id, folder or builtin")
    verb.add_argument("out", help="folder of the new base and adapter")
    verb.add_argument("--rounds", type=int, default=1, help="quantise, decompose again what that lost, ... (default 1)")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier fold")
    add_fields(verb, WHAT_AND_WHERE)

    verb = add_verb(verbs, export)
    verb.add_argument("adapter", help="run folder or adapter folder")
    verb.add_argument("out", help="folder of the LoRA")
    verb.add_argument("--to", default="lora", choices=("lora", "gguf"), help="lora (default): for PEFT and vLLM")
    verb.add_argument("--rank", type=int, help="at most so many ranks (DoTA, Bat: needed, or --energy)")
    verb.add_argument("--energy", type=float, help="as many ranks as keep this share of the change, 0 to 1")
    verb.add_argument("--weight", type=float, default=1.0, help="factor on the change (default 1)")
    verb.add_argument("--add", action="append", default=[], metavar="ADAPTER=WEIGHT", help="and so much of another one")
    verb.add_argument("--no-pad", action="store_true", help="do not fill up to a rank that vLLM serves")
    verb.add_argument("--model", help="base model (default: the one the adapter names)")
    verb.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    verb.add_argument("--revision", help="revision of a hub model (default: the one it was trained on)")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")

    verb = add_verb(verbs, import_)
    verb.add_argument("adapter", help="folder of a PEFT adapter")
    verb.add_argument("out", help="folder of the Inlay adapter")
    verb.add_argument("--model", help="base model (default: the one the adapter names)")
    verb.add_argument("--initial", help="the same adapter as saved before training (PiSSA and its relatives)")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier import")

    verb = add_verb(verbs, merge)
    verb.add_argument("adapter", help="run folder or adapter folder")
    verb.add_argument("out", help="folder of the new checkpoint")
    verb.add_argument("--model", help="base model (default: the one the adapter names)")
    verb.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    verb.add_argument(
        "--to", default="safetensors", choices=("safetensors", "gguf"), help="gguf: for llama.cpp, Ollama"
    )
    verb.add_argument("--shard", default="4GB", help="at most so large a file, as 500MB (default 4GB)")
    verb.add_argument("--no-probe", action="store_true", help="do not compare its logits with the adapter's")
    verb.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    verb.add_argument("--revision", help="revision of a hub model (default: the one it was trained on)")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")

    verb = add_verb(verbs, inspect)
    verb.argument_default = argparse.SUPPRESS  # what is not given is not asked of an adapter
    verb.add_argument("model", nargs="?", default="builtin", help="model (hub id, folder, builtin) or adapter (or run)")
    verb.add_argument("--base", help="base model of an adapter (default: the one it names)")
    verb.add_argument("--method", help="of a model: whose numbers are counted (default lamda)")
    verb.add_argument("--r", type=int, help="of a model: rank whose numbers are the budget (default 16)")
    verb.add_argument("--direction", choices=("flat", "peaked"), help="of a model: which spectra get more")
    verb.add_argument("--target-modules", help="of a model: names, a regex, or all-linear (default)")
    verb.add_argument("--layers", help="layer indices, as 0,1,2 (of a model with names in --target-modules)")
    verb.add_argument("--joint", action="store_true", help="what one right factor carries of layers with one input")
    verb.add_argument("--output", help="folder for JSON, ranks.yaml (of a model) and plots (default: print only)")
    verb.add_argument("--overwrite", action="store_true", help="replace such a folder")
    verb.add_argument("--revision", help="revision of a hub model")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")

    verb = add_verb(verbs, plan)
    verb.add_argument(
        "model", nargs="?", default="builtin", help="hub id, folder with a config.json, or builtin (default)"
    )
    add_fields(verb, ["method"])
    verb.add_argument("--r", default="16", help="rank, block size or bond; several with commas (default 16)")
    verb.add_argument("--batch-size", type=positive, help="sequences (default 4; with --fits: what is looked for)")
    verb.add_argument("--length", type=positive, default=1024, help="tokens of a sequence (default 1024)")
    verb.add_argument("--fits", type=float, metavar="GB", help="what is the largest that fits in a GPU of so much?")
    verb.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of the base")
    verb.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="what it would run on (default cuda)")
    verb.add_argument("--json", metavar="FILE", help="write the rows, in bytes")
    verb.add_argument("--csv", metavar="FILE", help="the same as CSV")
    add_fields(verb, [name for name in WHAT_AND_WHERE if name not in ("method", "r", "revision")])
    return top


def add_verb(verbs: Any, function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    """A subcommand from a function."""
    text, _, example = (function.__doc__ or "").partition("example:")
    verb = verbs.add_parser(
        function.__name__.rstrip("_"),
        help=text.split(".")[0],
        description=text.strip(),
        epilog=f"example: {example.rstrip()}",
    )
    verb.set_defaults(run=function)
    return verb


def add_train(verb: argparse.ArgumentParser) -> None:
    """Every recipe field and every hyperparameter as a flag; help shows the common ones and names the rest."""
    from inlay.workbench.recipe import Recipe, hyperparameters

    verb.add_argument("recipe", nargs="?", help="YAML file; flags override it")
    verb.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, from its last checkpoint")
    verb.add_argument(
        "--num-processes", type=positive, default=1, help="GPUs (or processes of a CPU) to train on together"
    )
    verb.add_argument(
        "--launch-config", metavar="FILE", help="accelerate's, as recipes/distributed/fsdp2.yaml (none: DDP)"
    )
    verb.add_argument("--dry-run", action="store_true", help="show recipe, first example, parameters and memory; stop")
    names = [f.name for f in fields(Recipe)] + list(hyperparameters())
    rest = [name for name in names if name not in COMMON]
    add_fields(verb, COMMON)
    add_fields(verb, rest, hidden=True)
    flags = " ".join(f"--{name.replace('_', '-')}" for name in rest)
    verb.epilog = f"also, each as in the recipe:\n{wrap(flags)}\n\n{verb.epilog}"


def add_cluster(verb: argparse.ArgumentParser) -> None:
    """Where trials run, and with what."""
    verb.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="run them on a Ray cluster (none: here)")
    verb.add_argument("--cpus", type=positive, help="cores of a trial there (default 1)")
    verb.add_argument("--gpus", type=float, help="GPUs of a trial there, or a part of one (default 1, if it has any)")


def add_fields(verb: argparse.ArgumentParser, names: Sequence[str], hidden: bool = False) -> None:
    """Recipe fields and hyperparameters as flags."""
    from inlay.workbench.recipe import Recipe, hyperparameters

    texts = {**{f.name: f.metadata["help"] for f in fields(Recipe)}, **hyperparameters()}
    for name in names:
        kind = {"metavar": "VALUE", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS if hidden else texts[name]}
        switch = {"nargs": "?", "const": True} if name in SWITCHES else {}
        verb.add_argument(f"--{name.replace('_', '-')}", dest=name, **kind, **switch)


SWITCHES = ("overwrite", "packing", "streaming", "keep_best", "gradient_checkpointing", "trust_remote_code")


def wrap(text: str) -> str:
    """Words in lines of a screen."""
    import textwrap

    return textwrap.fill(text, 108, break_on_hyphens=False, initial_indent="  ", subsequent_indent="  ")


def terminal() -> Any:
    """The console for people."""
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)


if __name__ == "__main__":
    main()
