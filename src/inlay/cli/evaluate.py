"""`inlay eval` and `inlay generate`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from inlay.cli.parser import terminal


def eval_command(options: argparse.Namespace) -> None:
    """Say how well a model, a run or an adapter does a task; with --base, also what the adapter changed.

    example:  inlay eval runs/mine --task commonsense --data boolq/test.json --by likelihood --base
    """
    from inlay.evaluation.metric import OnTask, load_metric, run_metric
    from inlay.evaluation.scores import score_difference, write_scores
    from inlay.messages import quiet
    from inlay.models.adapters import Adapter
    from inlay.models.base import BaseModel
    from inlay.models.loading import dtype_for

    quiet()
    if (options.task is None) == (options.metric is None):
        raise ValueError("--task or --metric says what is asked, one of the two")
    if options.metric:
        run = load_metric(options.metric)
    else:
        flags = {key: getattr(options, key) for key in ("task", "limit", "by", "tokens", "batch_size")}
        run = OnTask(**flags, data=options.data or "").load(terminal())
    dtype, folder, adapter = dtype_for(options.dtype), None, None
    hub = (options.revision, options.trust_remote_code)
    if (Path(options.model) / "adapter_config.json").is_file() or (Path(options.model) / "adapter").is_dir():
        adapter = Adapter.open(options.model, None, *hub)
        folder = adapter.folder
    if adapter:
        model, tokenizer = adapter.load(dtype)
    else:
        base = BaseModel(options.model, *hub)
        tokenizer = base.tokenizer()
        model = base.load(dtype, auto=base.evaluated_auto_class())
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
    figures, rows = run_metric(run, model, tokenizer)
    write_scores(out, name, figures, rows, about)
    for figure in figures:
        print(figure)
    if options.base:
        assert adapter is not None
        if adapter.may_modify_base:
            del model  # before its base is loaded a second time
            before, its = run_metric(run, adapter.load_unadapted_base(dtype), tokenizer)
        else:
            with model.disable_adapter():
                before, its = run_metric(run, model, tokenizer)
        write_scores(out, f"{name}-base", before, its, {**about, "adapter": None})
        for was, now in zip(before, figures, strict=True):
            print(f"base, {was}")
            if found := score_difference(was, now, its, rows):
                print(f"  the adapter, {now.name}: {found}")
    print(f"written to {out}")


def eval_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay eval`."""
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


def generate_command(options: argparse.Namespace) -> None:
    """Answer a prompt with a base model, or with a base and an adapter; without --prompt, converse.

    example:  inlay generate runs/builtin-bone --prompt "name[Blue Spice], eatType[pub], area[riverside]"
    """
    from inlay.evaluation.generate import answer
    from inlay.messages import quiet
    from inlay.models.adapters import Adapter
    from inlay.models.base import BaseModel
    from inlay.models.loading import dtype_for

    quiet()
    dtype = dtype_for(options.dtype)
    if options.adapter:
        model, tokenizer = Adapter.open(options.adapter, options.model).load(dtype)
    else:
        base = BaseModel(options.model or "builtin")
        tokenizer = base.tokenizer()
        model = base.load(dtype)
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


def generate_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay generate`."""
    verb.add_argument("adapter", nargs="?", help="run folder or adapter folder (none: the base alone)")
    verb.add_argument("--prompt", help="one prompt; without it, converse")
    verb.add_argument("--model", help="base model (default: the adapter's, or builtin)")
    verb.add_argument("--system", help="system message")
    verb.add_argument("--tokens", type=int, default=128, help="at most so many new tokens (default 128)")
    verb.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    verb.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))


def user(text: str) -> dict[str, str]:
    """A user's turn."""
    return {"role": "user", "content": text}


def read_line() -> str:
    """A line of the conversation; empty at its end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
