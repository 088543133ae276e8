"""Read which flags stand for fields of a recipe and for hyperparameters, without importing what defines them.

`resources/flags.json` is generated from the recipe and the methods by `python -m inlay.cli.recipe_reference`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from inlay.messages import did_you_mean, show_text

FILE = Path(__file__).parent.parent / "resources" / "flags.json"

# What other tools call a flag, and what it is called here.
ELSEWHERE = {
    "alpha": "alpha lora-alpha",
    "accumulation": "gradient-accumulation-steps gradient-accumulation grad-accum accumulate",
    "batch-size": "bs batch per-device-train-batch-size micro-batch-size train-batch-size",
    "chat-template": "template",
    "data": "dataset dataset-name dataset-path train-file datasets",
    "dropout": "lora-dropout",
    "dtype": "bf16 fp16 precision torch-dtype",
    "epochs": "epoch num-epochs num-train-epochs n-epochs e",
    "eval-every": "eval-steps eval-interval",
    "import": "imports plugin plugins custom-module",
    "gradient-checkpointing": "grad-checkpoint checkpointing use-gradient-checkpointing",
    "learning-rate": "lr peak-lr",
    "length": "max-length max-seq-length max-seq-len seq-len seq-length context-length",
    "max-length": "length max-seq-length max-seq-len seq-len seq-length cutoff-len sequence-len context-length",
    "method": "adapter finetuning-type peft peft-type fine-tune-type",
    "model": "base base-model model-name model-name-or-path pretrained m",
    "output": "out output-dir out-dir save-dir adapter-path o",
    "overwrite": "force overwrite-output-dir f",
    "quantize": "load-in-4bit load-in-8bit 4bit quant quantization qlora q",
    "r": "rank lora-r lora-rank",
    "report-to": "wandb use-wandb logger",
    "resume": "resume-from-checkpoint continue",
    "save-every": "save-steps save-interval",
    "scheduler": "lr-scheduler lr-scheduler-type",
    "steps": "max-steps iters num-steps",
    "target-modules": "lora-target-modules lora-target modules targets",
    "tokens": "max-tokens max-new-tokens n-predict",
    "trainer": "args training-args",
    "trust-remote-code": "allow-remote-code",
    "version": "v",
    "warmup": "warmup-ratio warmup-steps",
}


@dataclass(frozen=True)
class Flag:
    """Describe a field of a recipe or a hyperparameter: its help, its default as text, whether it is a switch."""

    help: str
    default: str | None
    switch: bool


_learned: dict[str, Flag] = {}  # hyperparameters of methods outside the package


def recipe_flags() -> dict[str, Flag]:
    """Return all fields of a recipe, then all hyperparameters, by name."""
    return {**table(), **_learned}


@cache
def table() -> dict[str, Flag]:
    """Return the fields and hyperparameters of the package itself."""
    return {name: Flag(**values) for name, values in json.loads(FILE.read_text(encoding="utf-8")).items()}


def learned_flags() -> list[str]:
    """Return the names of the hyperparameters that `learn_flags` found."""
    return list(_learned)


def learn_flags() -> None:
    """Make flags of the hyperparameters of methods outside the package, for which it imports them."""
    from inlay.methods import METHODS, every

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        others = every()[len(METHODS) :]
    for note in notes:
        show_text(f"note: {note.message}", to_stderr=True)
    for method in others:
        for f in fields(method):
            if f.name not in table():
                _learned[f.name] = Flag(f.metadata["help"], None if f.default is None else str(f.default), False)


# What stands without a flag, by its name in the help, and the flags under which others have it.
PLAIN = {
    "adapter": "adapter lora lora-path path run",
    "kind": "kind",
    "model": "model adapter path run",
    "models": "adapter path run",
    "name": "method name",
    "out": "output",
    "recipe": "config config-file recipe",
    "runs": "logdir output path run",
}

# What to do instead of a flag that a command does not have, by its commands (* for all).
INSTEAD = {
    ("compare tune", "dry-run"): "inlay train FILE --dry-run shows one run of it, without its block of compare or tune",
    ("compare tune", "resume"): "the same command resumes what was stopped",
    ("compare", "learning-rate"): "write it in the recipe, as in compare: {learning_rates: [1e-4, 3e-4, 1e-3]}",
    ("compare", "method"): "write it in the recipe, as in compare: {methods: [lora, bone, lamda]}",
    ("compare", "seed"): "write it in the recipe, as in compare: {seeds: [0, 1, 2]}",
    ("compare", "r"): "write it in the recipe, as in compare: {methods: [{method: lora, args: {r: 8}}]}",
    ("env methods schema", "output"): "it prints, and > FILE behind it writes a file",
    ("eval", "seed temperature top-p top-k"): "answers are greedy here; inlay generate draws",
    ("generate", "data"): "--prompts FILE --output FILE answers the prompts of a file",
    ("generate", "json"): "--prompts FILE --output FILE writes lines of JSON",
    ("plan", "output"): "--json FILE and --csv FILE write the rows",
    ("serve ui", "host"): "it answers on 127.0.0.1 alone, to which ssh -L 8000:127.0.0.1:8000 HOST leads",
    ("train", "jobs"): "--num-processes trains on several GPUs; inlay compare and inlay tune have --jobs",
    ("train", "json"): "metrics.jsonl in the run folder has every step",
    ("*", "device"): "CUDA_VISIBLE_DEVICES says which GPUs are used: CUDA_VISIBLE_DEVICES= for none",
}


def names_of(name: str) -> set[str]:
    """Return a flag's name, and what it is called here if it is another tool's."""
    return {name, *(own for own, names in ELSEWHERE.items() if name in names.split())}


def instead_of(verb: str, name: str) -> str:
    """Return what to do instead of the flag `name`, which `verb` does not have; empty where nothing is said of it."""
    for (verbs, flags), says in INSTEAD.items():
        if (verbs == "*" or verb in verbs.split()) and names_of(name) & set(flags.split()):
            return says
    field = next((own for own in map(field_name, sorted(names_of(name))) if own in recipe_flags()), None)
    if field is None or verb not in ("compare", "tune"):
        return ""
    return f"write it in the recipe, as in {field}: VALUE (under args where it is a hyperparameter)"


def field_name(flag: str) -> str:
    """Return the field that a flag stands for."""
    return flag.replace("-", "_")


def synonym(name: str, known: Iterable[str]) -> str | None:
    """Return the one of the flags `known` that other tools call `name`, if any."""
    known = list(known)
    return next((own for own, names in ELSEWHERE.items() if name in names.split() and own in known), None)


def flag_suggestion(name: str, known: Iterable[str]) -> str:
    """Return the end of an error's line on the flag `name`: the one of `known` that it probably means, if any."""
    close = did_you_mean(name, list(known))
    return close.replace("'", "--", 1).replace("'", "") if close.startswith("did you mean") else ""
