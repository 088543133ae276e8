"""A recipe: everything one fine-tuning run says, as a dataclass, as YAML and as command-line flags."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import PeftConfig

from inlay.host.config import InlayConfig
from inlay.methods import METHODS, find
from inlay.workbench import kinds, optimizers, peft_methods
from inlay.workbench.files import LENGTH, DamagedFileError, from_yaml
from inlay.zeroth import ZerothOrder

LARGEST = 2**32  # of the numbers in a recipe; beyond, libraries overflow in ways of their own


def entry(default: Any, text: str, **meta: Any) -> Any:
    """A recipe field with its help text."""
    meta["help"] = text
    return field(default_factory=default, metadata=meta) if callable(default) else field(default=default, metadata=meta)


@dataclass
class Recipe:
    """One fine-tuning run. Every field is a YAML key and a flag; what else trl's SFTConfig has goes in `trainer`."""

    model: str = entry("builtin", "hub id, local folder, or builtin (SmolLM2-135M-Instruct)")
    revision: str | None = entry(None, "revision of the hub model")
    trust_remote_code: bool = entry(False, "let the model's repository run its own code")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = entry("auto", "of the base; auto: right for the machine")

    quantize: Literal["none", "nf4", "nf4_offset", "int8"] = entry(
        "none", "base in 4 or 8 bits; nf4: folded (QDoTA, QPiSSA), nf4_offset and int8: quantised as it is"
    )
    fold_rounds: int = entry(1, "quantize: nf4: rounds of quantising and decomposing again what that lost", min=1)

    task: Literal["instruction", "language_modelling", "preference", "classification", "seq2seq", "vision"] = entry(
        "instruction",
        "what is learned: answers; plain text; preferences (DPO); labels; summaries; answers on images",
    )
    data: str = entry("builtin", "file, folder or hub data set; builtin: a slice of E2E NLG")
    split: str | None = entry(None, "split of a hub data set")
    streaming: bool = entry(
        False, "data is JSONL or Parquet (a file, folder or glob) that memory does not hold: needs steps"
    )
    eval_data: str | None = entry(None, "held-out data (default: cut from data)")
    eval_size: int | float | None = entry(None, "held-out examples, or their share (default: 100, at most a tenth)")
    columns: dict = entry(dict, "which column plays which role: {prompt: mr, answer: ref}")
    system: str | None = entry(None, "system message put before every example")
    max_length: int = entry(512, "tokens; longer examples are cut", min=8)
    packing: bool = entry(False, "pack short examples into full sequences")

    method: str = entry("bone", "inlay methods lists them; peft:NAME is one of PEFT's (peft:dora), full trains all")
    args: dict = entry(dict, "the method's hyperparameters (fields of PEFT's config); ours are flags too: --r 16")
    scale: float | None = entry(None, "factor on the change")
    dropout: float = entry(0.0, "dropout on the change")
    target_modules: list | str = entry("all-linear", "names, a regex, or all-linear")
    exclude_modules: list | str | None = entry(None, "names or a regex")
    layers_to_transform: list | None = entry(None, "layer indices")
    modules_to_save: list | None = entry(None, "modules trained whole and saved")
    patterns: dict = entry(dict, "hyperparameters per module: {k_proj: {r: 4}}")
    allocate: Literal["none", "energy", "energy_peaked", "welore", "variance", "blocks"] = entry(
        "none",
        "ranks per layer within what r trains: energy from the weights' spectra (LaMDA++), welore by one threshold on "
        "them, variance from the layers' inputs (EVA); blocks: of smt, the largest of all; they end up in patterns",
    )
    calibration: int = entry(16, "batches that starts and ranks from data look at, at most", min=1)
    bias: str = entry("none", "none, all or inlay_only")
    saver: Literal["none", "velora", "wta_crs"] = entry(
        "none", "keep less of a layer's input, for an estimate of A's gradient: velora (biased), wta_crs (unbiased)"
    )

    learning_rate: float = entry(5e-4, "peak learning rate", min=0)
    epochs: float = entry(1.0, "passes over the data", min=0)
    steps: int | None = entry(None, "optimiser steps, in place of epochs", min=1)
    batch_size: int | Literal["auto"] = entry(8, "examples per device and step, or auto: the largest that fits", min=1)
    accumulation: int = entry(1, "micro-batches per optimiser step", min=1)
    scheduler: str = entry("cosine", "any of transformers' schedulers")
    warmup: float = entry(0.03, "share of the steps (or their number, from 1 up)", min=0)
    weight_decay: float = entry(0.0, "AdamW's", min=0)
    optimizer: str | None = entry(
        None,
        "any of transformers' optimisers, muon, scion or subspace_descent (default: adamw_torch; sgd without backward)",
    )
    optimizer_args: dict = entry(dict, "what else the optimiser takes: {rank: 64} for galore_adamw, subspace_descent")
    lr_ratio: float | None = entry(None, "LoRA+: outer factors (B) learn so many times faster; 16 is usual")
    step: Literal["backward", "mezo", "subzero"] = entry(
        "backward", "where gradients come from; mezo and subzero ask for losses alone, in the memory of inference"
    )
    step_args: dict = entry(
        dict,
        "of mezo and subzero: {epsilon: 1e-3, queries: 1, batched: false}, the last for all queries in one pass; of "
        "subzero also rank and renew",
    )
    flat_noise: float = entry(0.0, "Flat-LoRA: noise on the weights in training, over their rows' norms; 0.05", min=0)
    max_grad_norm: float = entry(1.0, "clipping of gradients from a backward pass", min=0)
    skip_nan: int = entry(0, "steps with NaN or Inf to pass over before one ends the run", min=0)
    gradient_checkpointing: bool = entry(False, "less memory, about a third more time")
    seed: int = entry(0, "of everything random", min=0)
    trainer: dict = entry(dict, "any other field of trl's SFTConfig or DPOConfig (else: TrainingArguments)")

    eval_every: int | None = entry(None, "steps between evaluations (default: before and after only)", min=1)
    early_stopping: int | None = entry(None, "evaluations without improvement to stop after, at the best", min=1)
    keep_best: bool = entry(False, "end with the best checkpoint, not the last")
    save_every: int | None = entry(None, "steps between checkpoints (default: a tenth of the run; 0: none)", min=0)
    report_to: str = entry("none", "trackers: tensorboard, wandb, trackio, ...")

    output: str | None = entry(None, "run folder (default: runs/<model>-<method>)")
    overwrite: bool = entry(False, "replace a run folder that exists")
    samples: int = entry(4, "held-out prompts answered before and after", min=0)
    push_to_hub: str | None = entry(None, "hub repository to upload the adapter to")

    def __post_init__(self) -> None:
        conform_all(self)
        if self.eval_size is not None and self.eval_size <= 0:
            raise ValueError(f"eval_size: {self.eval_size} holds out nothing; give a number of examples or a share")
        if self.early_stopping and not self.eval_every:
            raise ValueError(f"early_stopping={self.early_stopping} needs eval_every: the steps between evaluations")
        if self.keep_best and not self.eval_every:
            raise ValueError("keep_best needs eval_every: the steps between evaluations")
        if self.streaming and (self.steps is None or self.split is not None):
            raise ValueError(
                "streaming needs steps, as nobody knows the data's length, and takes no split; name the files"
            )
        if self.allocate != "none":
            check_allocate(self)
        check_foreign(self)
        check_task(self)
        self.adapter()
        check_step(self)

    def adapter(self, steps: int = 10**6) -> PeftConfig | None:
        """The config of the adapter that a run of so many steps trains; None where it trains the model itself.

        Raises:
            ValueError: an unknown method or hyperparameter.
        """
        if peft_methods.is_ours(self.method):
            return self.config()
        if self.method == peft_methods.FULL:
            return None
        kind = kinds.find(self.task).peft
        return peft_methods.config(self.method, self.args, self._where(), steps, kind)

    def config(self) -> InlayConfig:
        """The config of one of Inlay's methods; raises a ValueError for an unknown method or hyperparameter."""
        names = ("method", "args", "scale", "dropout", "patterns", "bias", "saver")
        return InlayConfig(
            task_type=kinds.find(self.task).peft, **{n: getattr(self, n) for n in names}, **self._where()
        )

    def _where(self) -> dict[str, Any]:
        names = ("modules_to_save", "target_modules", "exclude_modules", "layers_to_transform")
        values = {name: getattr(self, name) for name in names}
        for name in ("target_modules", "exclude_modules"):  # a bare name is no regex of a whole path
            if isinstance(values[name], str) and re.fullmatch(r"[\w.]+", values[name]):
                values[name] = [values[name]]
        return values

    @property
    def optim(self) -> str:
        """The optimiser's name."""
        return self.optimizer or ("adamw_torch" if self.step == "backward" else "sgd")

    def zeroth(self) -> ZerothOrder | None:
        """What estimates gradients where there is no backward pass.

        Raises:
            ValueError: an unknown or wrong value in `step_args`.
        """
        hints = {name: hint for name, hint in typing.get_type_hints(ZerothOrder).items() if name in STEPS[self.step]}
        for name in self.step_args:
            if name not in hints:
                raise ValueError(f"step_args: step {self.step} has no {name!r}; it has {', '.join(hints) or 'none'}")
        values = {name: conform(f"step_args: {name}", hints[name], value) for name, value in self.step_args.items()}
        if "rank" in hints:
            values = {"rank": 8, **values}
        return ZerothOrder(**values, seed=self.seed) if hints else None

    @property
    def kept(self) -> str:
        """The folder, within the run's, of what was trained."""
        return "model" if self.method == peft_methods.FULL else "adapter"

    def run_folder(self) -> Path:
        """Where the run goes; without `output`, the first of runs/<model>-<method>, -2, -3, ... that is free."""
        if self.output:
            return Path(self.output).expanduser()
        name = Path("runs") / f"{Path(self.model).name}-{self.method.replace(':', '-')}"
        others = (name.with_name(f"{name.name}-{i}") for i in itertools.count(2))
        return next(path for path in itertools.chain([name], others) if not path.exists())

    def resolved(self, **settled: Any) -> Recipe:
        """The same recipe with nothing left to defaults of our methods, and with what the run settled."""
        if not peft_methods.is_ours(self.method):
            return replace(self, **settled)
        method = self.config().build()
        args = {f.name: getattr(method, f.name) for f in fields(method) if f.name not in ("scale", "dropout")}
        return replace(self, args=args, **settled)

    def to_yaml(self) -> str:
        """Every field, as YAML."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)

    def differences(self) -> str:
        """The fields that differ from the defaults, as YAML."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return yaml.safe_dump({f.name: values[f.name] for f in fields(self) if values[f.name] != default_of(f)})


def check_foreign(recipe: Recipe) -> None:
    """Refuse what only our methods have, where the method is PEFT's or full fine-tuning."""
    if peft_methods.is_ours(recipe.method):
        return
    full, packed = recipe.method == peft_methods.FULL, recipe.quantize
    names = ["scale", "dropout", "patterns", "bias", "saver", "lr_ratio", "flat_noise"]
    names += ["args", "modules_to_save"] if full else []
    for f in fields(recipe):
        if f.name in names and getattr(recipe, f.name) != default_of(f):
            hint = "it trains all there is" if full else "give the fields of PEFT's config under args"
            raise ValueError(f"{f.name}={getattr(recipe, f.name)!r} is not for method {recipe.method}; {hint}")
    if packed == "nf4" or (full and packed != "none"):
        raise ValueError(
            f"quantize: {packed} is not for method {recipe.method}; " + ("none is" if full else "nf4_offset is")
        )


STEPS = {  # and what each takes as `step_args`
    "backward": (),
    "mezo": ("epsilon", "queries", "batched"),
    "subzero": ("epsilon", "queries", "batched", "rank", "renew"),
}


def check_step(recipe: Recipe) -> None:
    """Refuse ways to take a step that cannot be, or that do not go together."""
    recipe.zeroth()
    optimizers.check(recipe.optim, recipe.method == peft_methods.FULL, recipe.optimizer_args)
    if recipe.step != "backward" and recipe.method == peft_methods.FULL:
        raise ValueError(f"step: {recipe.step} keeps a copy of what is trained, so it is for adapters, not for full")
    if recipe.step != "backward" and recipe.gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing: step {recipe.step} has no backward pass to save memory for")
    if recipe.step != "backward" and recipe.saver != "none":
        raise ValueError(f"saver: step {recipe.step} has no backward pass to keep anything for")
    alone = recipe.task in ("instruction", "language_modelling") and not recipe.packing
    if recipe.step_args.get("batched") and not alone:
        raise ValueError("step_args: batched is for tasks instruction and language_modelling without packing")
    if recipe.lr_ratio is not None and recipe.lr_ratio <= 0:
        raise ValueError(f"lr_ratio: {recipe.lr_ratio} is not above 0")


def check_task(recipe: Recipe) -> None:
    """Refuse what a task has no use for, or what is made for causal language models alone."""
    if recipe.packing and recipe.task != "instruction":
        raise ValueError(f"packing is for task instruction, not {recipe.task}; leave it out")
    if recipe.system is not None and recipe.task in ("classification", "language_modelling"):
        raise ValueError(f"system: task {recipe.task} has no prompt it could stand before; leave it out")
    if recipe.data == "builtin" and recipe.task not in ("instruction", "seq2seq"):
        raise ValueError(f"data: the built-in slice of E2E is not for task {recipe.task}; name a file")
    if recipe.task == "instruction":
        return
    if recipe.streaming:
        raise ValueError(f"streaming is for task instruction, not {recipe.task}; leave it out")
    if recipe.task == "vision" and peft_methods.is_ours(recipe.method) and find(recipe.method).needs:
        raise ValueError(f"method {recipe.method} starts from data, which task vision does not show it; choose another")
    if recipe.quantize == "nf4":
        raise ValueError(f"quantize: nf4 (folded) is for task instruction; {recipe.task} takes nf4_offset or int8")
    planned = kinds.find(recipe.task).causal and recipe.task != "preference"
    if recipe.batch_size == "auto" and not planned:
        raise ValueError(f"batch_size: auto is not planned for task {recipe.task}; give a number")
    if recipe.allocate != "none" and not kinds.find(recipe.task).causal:
        raise ValueError(f"allocate: ranks from spectra are for causal language models, not task {recipe.task}")


def check_allocate(recipe: Recipe) -> None:
    """Refuse ranks to allocate where there are none, or where they are given already."""
    if recipe.patterns:
        raise ValueError(f"allocate={recipe.allocate} sets patterns itself; remove one of the two")
    if (recipe.allocate == "blocks") != (recipe.method == "smt"):
        raise ValueError(f"allocate={recipe.allocate} is not for method {recipe.method}; smt has blocks, others ranks")
    if "r" not in [f.name for f in fields(find(recipe.method))]:
        raise ValueError(
            f"allocate={recipe.allocate}: {recipe.method} has no rank r; set allocate: none or choose a method with r"
        )


def reference() -> str:
    """`docs/recipe.md`: every field with its default and what it means."""
    from inlay.workbench.comparison import Comparison
    from inlay.workbench.tuning import Rescore, Search

    rows, compare, tune, rescore = (
        [f"| `{f.name}` | `{json.dumps(default_of(f))}` | {f.metadata['help']} |" for f in fields(cls)]
        for cls in (Recipe, Comparison, Search, Rescore)
    )
    hyper = [f"| `{name}` | {text} |" for name, text in sorted(hyperparameters().items())]
    lines = ["# Every field of a recipe", "", "Each is a YAML key and a flag (`learning_rate` is `--learning-rate`)."]
    lines += ["", "| field | default | meaning |", "|---|---|---|", *rows]
    lines += [
        "",
        "Hyperparameters of methods go under `args`, or are flags:",
        "",
        "| name | meaning |",
        "|---|---|",
        *hyper,
        "",
        "`inlay compare` reads a recipe of what all runs share, and these under `compare`:",
        "",
        "| field | default | meaning |",
        "|---|---|---|",
        *compare,
        "",
        "`inlay tune` reads a recipe of what all trials share, and these under `tune`:",
        "",
        "| field | default | meaning |",
        "|---|---|---|",
        *tune,
        *[row.replace("`", "`rescore.", 1) for row in rescore],
    ]
    return "\n".join(lines) + "\n"


def told(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says that is not the default; where it is kept and run is no part of it."""
    values = {f.name: value for f in fields(Recipe) if (value := getattr(recipe, f.name)) != default_of(f)}
    return {name: value for name, value in values.items() if name not in ("output", "overwrite")}


def default_of(f) -> Any:
    """A field's default value."""
    return f.default if f.default is not MISSING else f.default_factory()


def load(path: str | None, overrides: dict[str, Any]) -> Recipe:
    """A recipe from a YAML file (or none) with `overrides` on top; hyperparameters of methods go to `args`.

    Raises:
        ValueError: the file is missing or no mapping, a key is unknown, or a value does not fit.
    """
    values = read_yaml(path) if path else {}
    if "compare" in values:
        raise ValueError(f"{path} is a comparison, not one run; inlay compare runs it")
    if "tune" in values:
        raise ValueError(f"{path} is a search, not one run; inlay tune runs it, and writes the best.yaml of one")
    return from_values(values, overrides, path)


def from_values(values: dict[str, Any], overrides: dict[str, Any], path: str | None = None) -> Recipe:
    """A recipe from what was read from `path`, with `overrides` on top; as `load`."""
    names, hyper = [f.name for f in fields(Recipe)], hyperparameters()
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
            if key in hyper:
                hint = f"it is a hyperparameter: write it under args, as args: {{{key}: {values[key]!r}}}"
            raise ValueError(f"{path}: unknown key {key!r}; {hint}")
    if not isinstance(values.get("args") or {}, dict):
        raise ValueError(f"{path}: args: {values['args']!r} is not a mapping")
    args = {**(values.get("args") or {}), **{k: v for k, v in overrides.items() if k in hyper}}
    plain = {k: v for k, v in overrides.items() if k not in hyper}
    return Recipe(**{**values, **plain, "args": {**args, **(plain.get("args") or {})}})


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML mapping from a file."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            values = from_yaml(file.read(LENGTH + 1))  # no more, of what may have no end
    except FileNotFoundError:
        raise ValueError(f"recipe {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"recipe {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter: a date that is none
        raise DamagedFileError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"recipe {path} must be a mapping of fields to values, not a {type(values).__name__}")
    if odd := [key for key in values or {} if not isinstance(key, str)]:
        raise ValueError(f"recipe {path}: the key {odd[0]!r} is no field's name")
    return values or {}


def hyperparameters() -> dict[str, str]:
    """Every hyperparameter of every method that is no recipe field itself, with its help."""
    own = {f.name for f in fields(Recipe)}
    return {f.name: f.metadata["help"] for m in reversed(METHODS) for f in fields(m) if f.name not in own}


def from_flag(name: str, text: str) -> Any:
    """A flag's text as its field's type: text stays text, names with commas become a list, the rest is read as YAML.

    Raises:
        ValueError: it cannot be read.
    """
    hint = typing.get_type_hints(Recipe).get(name)
    options = typing.get_args(hint) or (hint,)
    if type(None) in options and text in ("null", "none", ""):
        return None
    names = re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", text)
    if list in options and names:
        return [from_yaml(part) for part in text.split(",")]
    if str in options and not (list in options and text.startswith("[") and text.endswith("]")):
        return text
    try:
        return from_yaml(text)
    except (yaml.YAMLError, ValueError):
        raise ValueError(f"{name}: {text[:60]!r} cannot be read as {' or '.join(map(describe, options))}") from None


def conform_all(filled: Any) -> None:
    """Make every field of a dataclass the type it is annotated with.

    Raises:
        ValueError: a value cannot be, or is out of bounds.
    """
    hints = typing.get_type_hints(type(filled))
    for f in fields(filled):
        value = conform(f.name, hints[f.name], getattr(filled, f.name))
        if "min" in f.metadata and isinstance(value, (int, float)) and value < f.metadata["min"]:
            raise ValueError(f"{f.name}: {value} is below {f.metadata['min']}")
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise ValueError(f"{f.name}: {value!r:.40} is beyond {LARGEST:,}")
        setattr(filled, f.name, value)


def conform(name: str, hint: Any, value: Any) -> Any:
    """`value` as the annotated type, reading what YAML or a flag may have left as text.

    Raises:
        ValueError: it is not of that type; the message says what is.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    for option in options:
        for choice in typing.get_args(option) if typing.get_origin(option) is Literal else ():
            if value == choice:
                return value
        if option is type(None) and value is None:
            return None
        if option is float and not isinstance(value, bool):  # YAML reads 5e-4 as text
            try:
                if math.isfinite(float(value)):
                    return float(value)
            except (TypeError, ValueError, OverflowError):
                pass
        elif isinstance(option, type) and isinstance(value, option) and not (option is int and isinstance(value, bool)):
            if not plain(value):
                raise ValueError(f"{name}: {value!r:.100} holds what is no text, number, list or mapping of names")
            return value
    raise ValueError(f"{name}: {value!r:.100} is not {' or '.join(map(describe, options))}")


def plain(value: Any) -> bool:
    """Whether YAML and JSON both give a value back as it is."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
    return (
        all(map(plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, (str, int, float, type(None)))
    )


def describe(option: Any) -> str:
    """A type in the words of a user."""
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    return words.get(option, "nothing" if option is type(None) else "a mapping")
