"""`inlay eval` and `inlay generate`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from inlay.cli.parser import SCALE
from inlay.messages import Terminal, show_text


def eval_command(options: argparse.Namespace) -> None:
    """Say how well a model, a run or an adapter does a task; with --base, also what the adapter changed.

    example:  inlay eval runs/mine --task commonsense --data boolq/test.json --by likelihood --base
    """
    from inlay.evaluation.evaluate_model import evaluate_model
    from inlay.messages import quiet

    quiet()
    given = {key: value for key, value in vars(options).items() if key not in ("verb", "run")}
    evaluation = evaluate_model(**given, console=Terminal(), done=show_text)
    show_text(f"written to {evaluation.folder}")


def eval_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay eval`."""
    verb.add_argument("model", help="hub id, folder, builtin, run folder or adapter folder")
    verb.add_argument("--task", help="commonsense, gsm8k, exact, text (BLEU, chrF, NIST, ROUGE), classification, "
                      "perplexity, or lm-eval:NAME, also a YAML file or a folder of them")  # fmt: skip
    verb.add_argument("--metric", help="in place of a task: module:function, (model, tokenizer) -> a number")
    verb.add_argument("--data", help="a file or data set, as for train (lm-eval tasks bring theirs)")
    verb.add_argument("--by", choices=("generation", "likelihood"), default="generation", help="how options are chosen")
    verb.add_argument("--base", action="store_true", help="evaluate the base too, and say what the adapter changed")
    verb.add_argument("--scale", type=float, default=1.0, help=SCALE)
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
    from inlay.evaluation.run_settings import chat_settings
    from inlay.messages import quiet
    from inlay.models.adapters import Adapter
    from inlay.models.base import BaseModel
    from inlay.models.loading import dtype_for

    quiet()
    dtype = dtype_for(options.dtype)
    if options.adapter:
        model, tokenizer = Adapter.open(options.adapter, options.model).load(dtype, scale=options.scale)
    elif options.scale != 1:
        raise ValueError(
            f"--scale {options.scale}: there is no adapter; name one, as in inlay generate runs/mine --scale 0.5"
        )
    else:
        base = BaseModel(options.model or "builtin")
        tokenizer = base.tokenizer()
        model = base.load(dtype)
    model.eval()
    extra = {"do_sample": True, "temperature": options.temperature} if options.temperature > 0 else {}
    settings = chat_settings(options.adapter or options.model or "")
    if options.system is not None:
        settings = replace(settings, system=options.system or None)
    chat = settings.chat([])
    if options.prompt is not None:
        asked = settings.example({"prompt": [*chat, user(options.prompt)]})
        show_text(answer(model, tokenizer, [asked], options.tokens, **extra)[0])
        return
    show_text("an empty line ends the conversation", to_stderr=True)
    while line := read_line():
        chat.append(user(line))
        said = answer(model, tokenizer, [settings.example({"prompt": chat})], options.tokens, **extra)[0]
        chat.append({"role": "assistant", "content": said})
        show_text(said)


def generate_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay generate`."""
    verb.add_argument("adapter", nargs="?", help="run folder or adapter folder (none: the base alone)")
    verb.add_argument("--prompt", help="one prompt; without it, converse")
    verb.add_argument("--model", help="base model (default: the adapter's, or builtin)")
    verb.add_argument("--system", help="system message (default: that of the run; '' for none)")
    verb.add_argument("--scale", type=float, default=1.0, help=SCALE)
    verb.add_argument("--tokens", type=int, default=128, help="at most so many new tokens (default 128)")
    verb.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    verb.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))


def user(text: str) -> dict[str, str]:
    """Return a user's turn of a conversation."""
    return {"role": "user", "content": text}


def read_line() -> str:
    """Read a line of the conversation; empty at its end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
