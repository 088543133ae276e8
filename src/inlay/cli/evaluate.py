"""`inlay eval` and `inlay generate`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from inlay.cli.parser import SCALE, whole_number
from inlay.messages import Terminal, show_json, show_piece, show_text


def eval_command(options: argparse.Namespace) -> None:
    """Evaluate a model, a run or an adapter on a task; --base shows what the adapter changed.

    example:  inlay eval runs/mine --task commonsense --data boolq/test.json --by likelihood --base
    """
    from inlay.evaluation.evaluate_model import evaluate_model
    from inlay.messages import quiet

    quiet()
    given = {key: value for key, value in vars(options).items() if key not in ("verb", "run", "json")}
    say = partial(show_text, to_stderr=options.json)
    evaluation = evaluate_model(**given, console=Terminal(stderr=options.json), done=say)
    say(f"written to {evaluation.file}")
    if options.json:
        show_json(evaluation.as_data())


def eval_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay eval`."""
    verb.add_argument("model", help="hub id, folder, builtin, run folder or adapter folder")
    verb.add_argument("--task", help="commonsense, gsm8k, exact, text (BLEU, chrF, NIST, ROUGE), classification, "
                      "reward, perplexity, or lm-eval:NAME, also a YAML file or a folder of them")  # fmt: skip
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
    verb.add_argument("--json", action="store_true", help="print the scores as JSON; what else is said goes to stderr")
    verb.add_argument("--revision", help="revision of a hub model (default: the one an adapter was trained on)")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")


def generate_command(options: argparse.Namespace) -> None:
    """Answer a prompt or a file of prompts; without either, hold a conversation.

    The model is a base model, or a run or an adapter with its base. The answer appears as it is written, and a note
    says when it was cut.

    example:  inlay generate runs/builtin-bone --prompt "name[Blue Spice], eatType[pub], area[riverside]"
    """
    from inlay.evaluation.answering import load_answering
    from inlay.evaluation.prompt_file import check_new_file, read_prompts, write_answers
    from inlay.evaluation.sampling import Sampling
    from inlay.messages import quiet
    from inlay.models.loading import dtype_for

    drawn = {name: vars(options)[name] for name in ("top_p", "top_k", "seed")}
    sampling = Sampling(options.temperature, **drawn, repetition_penalty=options.repetition_penalty)
    if not options.temperature and (needless := [name for name, value in drawn.items() if value is not None]):
        flag = needless[0].replace("_", "-")
        raise ValueError(f"--{flag}: nothing is drawn at temperature 0; give a --temperature too, such as 0.7")
    if options.prompts and options.prompt is not None:
        raise ValueError("--prompt and --prompts were given; accepted: one of the two")
    if bool(options.prompts) != bool(options.output):
        raise ValueError("--prompts FILE.jsonl and --output FILE.jsonl go together: prompts in, answers out")
    if options.output:
        check_new_file(Path(options.output), options.overwrite)
    quiet()
    asked = read_prompts(options.prompts) if options.prompts else []
    source = load_answering(options.adapter, options.model, dtype_for(options.dtype), options.scale, options.system)
    sampling.start()
    if options.prompts:
        answers = source.ask_all([row.asked for row in asked], options.tokens, sampling, options.batch_size, Terminal())
        write_answers(Path(options.output), asked, answers, options.overwrite)
        cut = sum(answer.cut for answer in answers)
        note = f"; {cut} of them cut after {options.tokens} tokens (--tokens)" if cut else ""
        show_text(f"written to {options.output}: {len(answers)} answers{note}")
        return

    def say(chat: list[dict[str, str]]) -> str:
        answer = source.ask({"prompt": chat}, options.tokens, sampling, show_piece)
        show_text("")
        if answer.cut:
            show_text(f"note: cut after {options.tokens} tokens; --tokens allows more", to_stderr=True)
        return answer.text

    if options.prompt is not None:
        say([user(options.prompt)])
        return
    show_text("an empty line ends the conversation", to_stderr=True)
    chat: list[dict[str, str]] = []
    while line := read_line():
        chat.append(user(line))
        chat.append({"role": "assistant", "content": say(chat)})


def generate_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay generate`."""
    verb.add_argument("adapter", nargs="?", help="run folder or adapter folder (none: the base alone)")
    verb.add_argument("--prompt", help="one prompt; without it and --prompts, hold a conversation")
    verb.add_argument("--prompts", metavar="FILE", help="JSONL: prompt (text or messages) or messages on each line")
    verb.add_argument("--output", metavar="FILE", help="JSONL: the lines of --prompts with answer, tokens and cut")
    verb.add_argument("--overwrite", action="store_true", help="replace such a file")
    verb.add_argument("--batch-size", type=whole_number, default=8, help="prompts of a file at a time (default 8)")
    verb.add_argument("--model", help="base model (default: the adapter's, or builtin)")
    verb.add_argument("--system", help="system message (default: that of the run; '' for none)")
    verb.add_argument("--scale", type=float, default=1.0, help=SCALE)
    verb.add_argument("--tokens", type=whole_number, default=128, help="at most so many new tokens (default 128)")
    verb.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    verb.add_argument("--top-p", type=float, help="draw from the likeliest tokens of so much probability together")
    verb.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens (0: from all)")
    verb.add_argument("--repetition-penalty", type=float, help="above 1: what was said is less likely to be repeated")
    verb.add_argument("--seed", type=int, help="of the draws (default: another one each time)")
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
