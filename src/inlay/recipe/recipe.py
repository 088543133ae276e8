"""A recipe: everything one fine-tuning run says, as a dataclass, as YAML and as command-line flags."""

from __future__ import annotations

import itertools
import re
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import PeftConfig

from inlay.host.config import InlayConfig
from inlay.methods import find
from inlay.models.model_classes import find_model_class
from inlay.numerics.zeroth_order import ZerothOrder
from inlay.recipe.optimizers import check_optimizer
from inlay.recipe.peft_methods import FULL, is_inlay, peft_config
from inlay.recipe.schema import conform, conform_all, default_of, field_of
from inlay.recipe.sources import check_sources, sources


@dataclass
class Recipe:
    """One fine-tuning run. Every field is a YAML key and a flag; what else trl's SFTConfig has goes in `trainer`."""

    model: str = field_of("builtin", "hub id, local folder, or builtin (SmolLM2-135M-Instruct)")
    revision: str | None = field_of(None, "revision of the hub model")
    trust_remote_code: bool = field_of(False, "let the model's repository run its own code")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field_of(
        "auto", "of the base; auto: right for the machine"
    )

    quantize: Literal["none", "nf4", "nf4_offset", "int8"] = field_of(
        "none", "base in 4 or 8 bits; nf4: folded (QDoTA, QPiSSA), nf4_offset and int8: quantised as it is"
    )
    fold_rounds: int = field_of(1, "quantize: nf4: rounds of quantising and decomposing again what that lost", min=1)

    task: Literal["instruction", "language_modelling", "preference", "classification", "seq2seq", "vision"] = field_of(
        "instruction",
        "what is learned: answers; plain text; preferences (DPO); labels; summaries; answers on images",
    )
    data: str | list = field_of(
        "builtin",
        "file, folder or hub data set; builtin: a slice of E2E NLG; a mixture: [{path: a.jsonl, weight: 2}, b.jsonl], "
        "each with columns, system and split of its own if it says so",
    )
    split: str | None = field_of(
        None, "split of a folder or hub data set (default: train, with validation held out if there is one)"
    )
    streaming: bool = field_of(
        False, "data is JSONL or Parquet (a file, folder or glob) that memory does not hold: needs steps"
    )
    eval_data: str | None = field_of(None, "held-out data (default: cut from data)")
    eval_size: int | float | None = field_of(None, "held-out examples, or their share (default: 100, at most a tenth)")
    columns: dict = field_of(dict, "which column plays which role: {prompt: mr, answer: ref}")
    system: str | None = field_of(None, "system message put before every example that has none of its own")
    empty_answers: Literal["refuse", "skip"] = field_of("refuse", "rows without an answer or a label: skip counts them")
    ignore: list = field_of(list, "columns and message keys to leave out that would change what is learned: [weight]")
    encoding: str = field_of("utf-8", "of text files: cp1252, utf-16, ...")
    tsv_quotes: Literal["auto", "quoted", "plain"] = field_of(
        "auto", "quotation marks in TSV: quoted encloses fields (pandas, spreadsheets), plain is text (GLUE)"
    )
    chat_template: str | None = field_of(
        None, "Jinja file in place of the model's chat template; training: the one that trl has for training its family"
    )
    chat_template_kwargs: dict = field_of(dict, "what the chat template gets too: {enable_thinking: false}")
    answers: Literal["all", "last"] = field_of("all", "which answers of a conversation are learned")
    max_length: int = field_of(512, "tokens; longer examples are cut", min=8)
    packing: bool = field_of(False, "pack short examples into full sequences")

    method: str = field_of("bone", "inlay methods lists them; peft:NAME is one of PEFT's (peft:dora), full trains all")
    args: dict = field_of(dict, "the method's hyperparameters (fields of PEFT's config); ours are flags too: --r 16")
    scale: float | None = field_of(None, "factor on the change")
    dropout: float = field_of(0.0, "dropout on the change")
    target_modules: list | str = field_of("all-linear", "names, a regex, or all-linear")
    exclude_modules: list | str | None = field_of(None, "names or a regex")
    layers_to_transform: list | None = field_of(None, "layer indices")
    modules_to_save: list | None = field_of(None, "modules trained whole and saved")
    patterns: dict = field_of(dict, "hyperparameters per module: {k_proj: {r: 4}}")
    allocate: Literal["none", "energy", "energy_peaked", "welore", "variance", "blocks"] = field_of(
        "none",
        "ranks per layer within what r trains: energy from the weights' spectra (LaMDA++), welore by one threshold on "
        "them, variance from the layers' inputs (EVA); blocks: of smt, the largest of all; they end up in patterns",
    )
    calibration: int = field_of(16, "batches that starts and ranks from data look at, at most", min=1)
    bias: str = field_of("none", "none, all or inlay_only")
    saver: Literal["none", "velora", "wta_crs"] = field_of(
        "none", "keep less of a layer's input, for an estimate of A's gradient: velora (biased), wta_crs (unbiased)"
    )

    learning_rate: float = field_of(5e-4, "peak learning rate", min=0)
    epochs: float = field_of(1.0, "passes over the data", min=0)
    steps: int | None = field_of(None, "optimiser steps, in place of epochs", min=1)
    batch_size: int | Literal["auto"] = field_of(
        8, "examples per device and step, or auto: the largest that fits", min=1
    )
    accumulation: int = field_of(1, "micro-batches per optimiser step", min=1)
    scheduler: str = field_of("cosine", "any of transformers' schedulers")
    warmup: float = field_of(0.03, "share of the steps (or their number, from 1 up)", min=0)
    weight_decay: float = field_of(0.0, "AdamW's", min=0)
    optimizer: str | None = field_of(
        None,
        "any of transformers' optimisers, muon, scion or subspace_descent (default: adamw_torch; sgd without backward)",
    )
    optimizer_args: dict = field_of(
        dict, "what else the optimiser takes: {rank: 64} for galore_adamw, subspace_descent"
    )
    lr_ratio: float | None = field_of(None, "LoRA+: outer factors (B) learn so many times faster; 16 is usual")
    step: Literal["backward", "mezo", "subzero"] = field_of(
        "backward", "where gradients come from; mezo and subzero ask for losses alone, in the memory of inference"
    )
    step_args: dict = field_of(
        dict,
        "of mezo and subzero: {epsilon: 1e-3, queries: 1, batched: false}, the last for all queries in one pass; of "
        "subzero also rank and renew",
    )
    flat_noise: float = field_of(
        0.0, "Flat-LoRA: noise on the weights in training, over their rows' norms; 0.05", min=0
    )
    max_grad_norm: float = field_of(1.0, "clipping of gradients from a backward pass", min=0)
    skip_nan: int = field_of(0, "steps with NaN or Inf to pass over before one ends the run", min=0)
    gradient_checkpointing: bool = field_of(False, "less memory, about a third more time")
    seed: int = field_of(0, "of everything random", min=0)
    trainer: dict = field_of(dict, "any other field of trl's SFTConfig or DPOConfig (else: TrainingArguments)")

    eval_every: int | None = field_of(None, "steps between evaluations (default: before and after only)", min=1)
    early_stopping: int | None = field_of(None, "evaluations without improvement to stop after, at the best", min=1)
    keep_best: bool = field_of(False, "end with the best checkpoint, not the last")
    save_every: int | None = field_of(None, "steps between checkpoints (default: a tenth of the run; 0: none)", min=0)
    report_to: str = field_of("none", "trackers: tensorboard, wandb, trackio, ...")

    output: str | None = field_of(None, "run folder (default: runs/<model>-<method>)")
    overwrite: bool = field_of(False, "replace a run folder that exists")
    samples: int = field_of(4, "held-out prompts answered before and after", min=0)
    push_to_hub: str | None = field_of(None, "hub repository to upload the adapter to")

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
        check_sources(self)
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
        if is_inlay(self.method):
            return self.config()
        if self.method == FULL:
            return None
        kind = find_model_class(self.task).peft
        return peft_config(self.method, self.args, self._where(), steps, kind)

    def config(self) -> InlayConfig:
        """The config of one of Inlay's methods; raises a ValueError for an unknown method or hyperparameter."""
        names = ("method", "args", "scale", "dropout", "patterns", "bias", "saver")
        return InlayConfig(
            task_type=find_model_class(self.task).peft, **{n: getattr(self, n) for n in names}, **self._where()
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
        return "model" if self.method == FULL else "adapter"

    def run_folder(self) -> Path:
        """Where the run goes; without `output`, the first of runs/<model>-<method>, -2, -3, ... that is free."""
        if self.output:
            return Path(self.output).expanduser()
        name = Path("runs") / f"{Path(self.model).name}-{self.method.replace(':', '-')}"
        others = (name.with_name(f"{name.name}-{i}") for i in itertools.count(2))
        return next(path for path in itertools.chain([name], others) if not path.exists())

    def resolved(self, **settled: Any) -> Recipe:
        """The same recipe with nothing left to defaults of our methods, and with what the run settled."""
        if not is_inlay(self.method):
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
    if is_inlay(recipe.method):
        return
    full, packed = recipe.method == FULL, recipe.quantize
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
    check_optimizer(recipe.optim, recipe.method == FULL, recipe.optimizer_args)
    if recipe.step != "backward" and recipe.method == FULL:
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
    given = sources(recipe)
    if any(one.system is not None for one in given) and recipe.task in ("classification", "language_modelling"):
        raise ValueError(f"system: task {recipe.task} has no prompt it could stand before; leave it out")
    if any(one.path == "builtin" for one in given) and recipe.task not in ("instruction", "seq2seq"):
        raise ValueError(f"data: the built-in slice of E2E is not for task {recipe.task}; name a file")
    check_chat(recipe)
    if recipe.task == "instruction":
        return
    if recipe.streaming:
        raise ValueError(f"streaming is for task instruction, not {recipe.task}; leave it out")
    if recipe.task == "vision" and is_inlay(recipe.method) and find(recipe.method).needs:
        raise ValueError(f"method {recipe.method} starts from data, which task vision does not show it; choose another")
    if recipe.quantize == "nf4":
        raise ValueError(f"quantize: nf4 (folded) is for task instruction; {recipe.task} takes nf4_offset or int8")
    planned = find_model_class(recipe.task).causal and recipe.task != "preference"
    if recipe.batch_size == "auto" and not planned:
        raise ValueError(f"batch_size: auto is not planned for task {recipe.task}; give a number")
    if recipe.allocate != "none" and not find_model_class(recipe.task).causal:
        raise ValueError(f"allocate: ranks from spectra are for causal language models, not task {recipe.task}")


PREPARED = {  # keys of trl's SFTConfig for data that it prepares; here it is given tokens and labels
    "completion_only_loss": "only answers are learned; task language_modelling learns all of a text",
    "assistant_only_loss": "only answers are learned",
    "chat_template_path": "use chat_template",
    "truncation_mode": "rows are cut at their end; shorten them in the data",
    "dataset_text_field": "use columns: {text: ...}",
    "dataset_kwargs": "the data is prepared already",
}


def check_chat(recipe: Recipe) -> None:
    """Refuse what is said of conversations where there are none, and what trl would do to them."""
    tasks = {
        "answers": ("instruction",),
        "chat_template": ("instruction", "preference"),
        "chat_template_kwargs": ("instruction", "preference"),
    }
    for f in fields(recipe):
        if recipe.task not in tasks.get(f.name, (recipe.task,)) and getattr(recipe, f.name) != default_of(f):
            raise ValueError(f"{f.name} is for task {' or '.join(tasks[f.name])}, not {recipe.task}; leave it out")
    for key, way in PREPARED.items():
        if key in recipe.trainer and recipe.task in ("instruction", "language_modelling", "preference"):
            raise ValueError(f"trainer: {key} has no effect; {way}")


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
