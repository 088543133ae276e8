"""Define a recipe: all settings of one fine-tuning run, as a dataclass, as YAML and as command-line flags."""

from __future__ import annotations

import itertools
import re
import typing
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import PeftConfig

from inlay.files.untrusted import user_path
from inlay.host.config import InlayConfig
from inlay.method import Method
from inlay.methods import find
from inlay.models.base import BaseModel
from inlay.models.model_classes import CHAT_TASKS, find_model_class
from inlay.numerics.zeroth_order import ZerothOrder
from inlay.outside import UnknownMethodError
from inlay.recipe.optimizers import check_optimizer, is_own_optimizer
from inlay.recipe.peft_methods import FULL, is_inlay, peft_config, peft_method_names
from inlay.recipe.rates import UNKNOWN, default_rate
from inlay.recipe.rewards import ACCEPTED, OF_RUN, reward_terms
from inlay.recipe.schema import conform, conform_all, default_of, field_of, yaml_key
from inlay.recipe.sources import check_sources, sources


@dataclass
class Recipe:
    """Describe one fine-tuning run.

    Every field is a YAML key and a flag; other fields of trl's SFTConfig go in `trainer`.
    """

    model: str = field_of("builtin", "hub id, local folder, or builtin (SmolLM2-135M-Instruct)")
    revision: str | None = field_of(None, "revision of the hub model")
    trust_remote_code: bool = field_of(False, "let the model's repository run its own code")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field_of(
        "auto", "dtype of the base; auto: what suits the machine"
    )

    quantize: Literal["none", "nf4", "nf4_offset", "int8"] = field_of(
        "none", "base in 4 or 8 bits; nf4: with a fold (QDoTA, QPiSSA); nf4_offset, int8: without"
    )
    fold_rounds: int = field_of(
        1, "with quantize: nf4, rounds of quantising the base and decomposing the error again", min=1
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = field_of(
        "auto", "the base's attention; auto: transformers' choice, which is sdpa where the model has it"
    )

    task: Literal[
        "instruction", "language_modelling", "preference", "orpo", "simpo", "kto", "reward", "grpo", "classification",
        "seq2seq", "vision",
    ] = field_of(
        "instruction",
        "what the model learns: answers; plain text; preferences of pairs (preference: DPO; orpo, simpo) or of single "
        "answers (KTO); to reward answers; rewards of its own answers (GRPO); labels; summaries; answers about images",
    )  # fmt: skip
    data: str | list = field_of(
        "builtin",
        "file, folder or hub data set; builtin: a slice of E2E NLG; a mixture: [{path: a.jsonl, weight: 2}, b.jsonl], "
        "each with columns, system and split of its own if it says so",
    )
    split: str | None = field_of(
        None, "split of a folder or hub data set (default: train, with validation held out if there is one)"
    )
    streaming: bool = field_of(
        False, "read data (JSONL, CSV, Parquet, ...: files, folders, globs) that exceeds memory; needs steps"
    )
    eval_data: str | None = field_of(None, "held-out data (default: split off data)")
    eval_size: int | float | None = field_of(
        None, "number or share of held-out examples (default: 100, at most a tenth)"
    )
    columns: dict = field_of(dict, "the column of each role: {prompt: mr, answer: ref}")
    system: str | None = field_of(None, "system message before every example that has none of its own")
    empty_answers: Literal["refuse", "skip"] = field_of(
        "refuse", "rows without an answer or a label: refuse the run, or skip them and count them"
    )
    unlabelled: str = field_of("-1", "label that marks a row without one; none: every label is a class")
    ignore: list = field_of(list, "columns and message keys to leave out that would change what is learned: [weight]")
    encoding: str = field_of("utf-8", "encoding of text files: cp1252, utf-16, ...")
    tsv_quotes: Literal["auto", "quoted", "plain"] = field_of(
        "auto", "quotation marks in TSV: quoted encloses fields (pandas, spreadsheets), plain is text (GLUE)"
    )
    chat_template: str | None = field_of(
        None, "Jinja file in place of the model's chat template; training: the one that trl has for training its family"
    )
    chat_template_kwargs: dict = field_of(dict, "further arguments of the chat template: {enable_thinking: false}")
    reward: str | list | dict | None = field_of(
        None,
        "of task grpo: exact_match, {format: REGEX}, or a function of yours, module:function or file.py:function; or a "
        "list of them, each with a weight if need be: [exact_match, {format: REGEX, weight: 0.2}]",
    )
    num_generations: int = field_of(8, "of task grpo: answers that are drawn for each prompt", min=2)
    temperature: float = field_of(1.0, "of task grpo: temperature at which these answers are drawn", min=0)
    max_new_tokens: int = field_of(128, "of task grpo: most tokens of an answer", min=1)
    answers: Literal["all", "last"] = field_of("all", "which answers of a conversation are learned")
    max_length: int = field_of(512, "tokens; longer examples are truncated", min=8)
    packing: bool = field_of(False, "pack short examples into full sequences")
    group_by_length: bool | Literal["auto"] = field_of(
        False, "batches of examples of similar length; auto: where this spares a twentieth of the tokens as padding"
    )

    imports: list = field_of(
        list,
        "modules of your own that define methods, as my_method or a/my_method.py, looked for beside the recipe, where "
        "you are and among what is installed; inlay imports them because you run the recipe, as with --import",
        key="import",
    )
    method: str = field_of(
        "bone", "one that inlay methods lists, peft:NAME for one of PEFT's (peft:dora), or full: train the whole model"
    )
    args: dict = field_of(
        dict, "the method's hyperparameters (for peft:NAME, fields of its config); Inlay's are flags too: --r 16"
    )
    scale: float | None = field_of(None, "factor s on the weight change")
    dropout: float = field_of(0.0, "dropout on the weight change")
    target_modules: list | str = field_of("all-linear", "names, a regex, or all-linear")
    exclude_modules: list | str | None = field_of(None, "names or a regex")
    layers_to_transform: list | None = field_of(None, "layer indices")
    experts: bool | int | dict = field_of(
        False,
        "adapt the fused experts of a mixture-of-experts model too: true, or how many of each layer, the busiest by "
        "the routing of --calibration batches, or {layers.0.mlp.experts: [0, 3]}",
        min=0,
    )
    modules_to_save: list | None = field_of(None, "modules trained in full and saved")
    patterns: dict = field_of(dict, "hyperparameters per module: {k_proj: {r: 4}}")
    allocate: Literal["none", "energy", "energy_peaked", "welore", "variance", "blocks"] = field_of(
        "none",
        "ranks per layer with no more parameters than r everywhere: energy from the weights' spectra (LaMDA++), welore "
        "by one threshold on them, variance from the layers' inputs (EVA); blocks (smt only): the largest of all "
        "layers; written to patterns",
    )
    calibration: int = field_of(16, "most batches that starts and ranks from data read", min=1)
    bias: str = field_of("none", "none, all or inlay_only")
    saver: Literal["none", "velora", "wta_crs"] = field_of(
        "none", "keep less of a layer's input and estimate A's gradient: velora (biased), wta_crs (unbiased)"
    )

    learning_rate: float | Literal["auto"] = field_of(
        "auto", "peak learning rate; auto: the method's own, as inlay methods lists them (for AdamW)", min=0
    )
    epochs: float = field_of(1.0, "passes over the data", min=0)
    steps: int | None = field_of(None, "optimiser steps, instead of epochs", min=1)
    batch_size: int | Literal["auto"] = field_of(
        8, "examples per device and micro-batch, or auto: the largest that fits", min=1
    )
    accumulation: int = field_of(1, "micro-batches per optimiser step", min=1)
    scheduler: str = field_of("cosine", "any of transformers' schedulers")
    warmup: float = field_of(0.03, "share of the steps, or from 1 up their number", min=0)
    weight_decay: float = field_of(0.0, "weight decay of AdamW", min=0)
    optimizer: str | None = field_of(
        None,
        "any of transformers' optimisers, muon, scion or subspace_descent (default: adamw_torch; sgd without backward)",
    )
    optimizer_args: dict = field_of(
        dict, "further arguments of the optimiser: {rank: 64} for galore_adamw, subspace_descent"
    )
    lr_ratio: float | None = field_of(
        None, "LoRA+: learning rate of the outer factors (B) over that of all others; 16 is usual"
    )
    core_ratio: float | None = field_of(
        None, "learning rate of cores between two factors (LaMDA's S) over that of all others"
    )
    step: Literal["backward", "mezo", "subzero"] = field_of(
        "backward", "source of the gradients; mezo and subzero use losses alone, in the memory of inference"
    )
    step_args: dict = field_of(
        dict,
        "for mezo and subzero: {epsilon: 1e-3, queries: 1, batched: false}; batched: all queries in one pass; for "
        "subzero also rank and renew",
    )
    flat_noise: float = field_of(
        0.0, "Flat-LoRA: noise on the weights in training, relative to the norms of their rows; 0.05 is usual", min=0
    )
    max_grad_norm: float = field_of(1.0, "gradient norm to clip at, where there is a backward pass", min=0)
    skip_nan: int = field_of(0, "steps with NaN or Inf that are skipped before one ends the run", min=0)
    gradient_checkpointing: bool = field_of(False, "recompute activations: less memory, about a third more time")
    seed: int = field_of(0, "seed of everything random", min=0)
    trainer: dict = field_of(
        dict,
        "any other field of the trainer's arguments: trl's SFTConfig, or DPOConfig, ORPOConfig, CPOConfig (SimPO), "
        "KTOConfig, RewardConfig, GRPOConfig; for labels and summaries TrainingArguments",
    )

    eval_every: int | None = field_of(None, "steps between evaluations (default: before and after only)", min=1)
    early_stopping: int | None = field_of(
        None, "evaluations without improvement before the run stops and keeps the best", min=1
    )
    keep_best: bool = field_of(False, "keep the best checkpoint, not the last")
    save_every: int | None = field_of(None, "steps between checkpoints (default: a tenth of the run; 0: none)", min=0)
    report_to: str = field_of("none", "experiment trackers: tensorboard, wandb, trackio, ...")

    output: str | None = field_of(None, "run folder (default: runs/<model>-<method>)")
    overwrite: bool = field_of(False, "replace a run folder that exists")
    samples: int = field_of(4, "held-out prompts answered before and after", min=0)
    push_to_hub: str | None = field_of(None, "hub repository to upload the adapter to")

    def __post_init__(self) -> None:
        conform_all(self)
        for module in self.imports:
            if not isinstance(module, str):
                raise ValueError(f"import: {module!r:.100} is not the name of a module")
        if self.eval_size is not None and self.eval_size <= 0:
            raise ValueError(f"eval_size: {self.eval_size} holds out nothing; give a number of examples or a share")
        if self.early_stopping and not self.eval_every:
            raise ValueError(
                f"early_stopping={self.early_stopping} needs eval_every: the steps between evaluations, as "
                "--eval-every 20"
            )
        if self.keep_best and not self.eval_every:
            raise ValueError("keep_best needs eval_every: the steps between evaluations, as --eval-every 20")
        if self.streaming and (self.steps is None or self.split is not None):
            raise ValueError(
                "streaming needs steps, because the data's length is unknown, and takes no split; name the files"
            )
        check_sources(self)
        if self.allocate != "none":
            check_allocate(self)
        check_inlay_only(self)
        if self.experts and self.quantize == "nf4":
            raise ValueError(
                "experts: transformers packs linear layers only, so quantize: nf4 cannot fold experts; take "
                "nf4_offset, which keeps them in 16 bits, or leave experts out"
            )
        if self.experts and self.flat_noise:
            raise ValueError(f"flat_noise={self.flat_noise} does not reach experts; set it to 0, or leave experts out")
        check_task(self)
        check_attention(self)
        self.adapter()
        check_step(self)

    def adapter(self, steps: int = 10**6) -> PeftConfig | None:
        """Return the config of the adapter that a run of `steps` steps trains; None for full fine-tuning.

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
        """Return the config of one of Inlay's methods; raise a ValueError for an unknown method or hyperparameter."""
        names = ("method", "args", "scale", "dropout", "patterns", "bias", "saver")
        try:
            return InlayConfig(
                task_type=find_model_class(self.task).peft,
                **{name: vars(self)[name] for name in names},
                experts=bool(self.experts) if isinstance(self.experts, int) else self.experts,
                **self._where(),
            )
        except UnknownMethodError:
            if (name := self.method.lower()) not in peft_method_names():
                raise
            raise UnknownMethodError(
                f"unknown method {self.method!r}; PEFT has it: did you mean 'peft:{name}'?"
            ) from None

    def _where(self) -> dict[str, Any]:
        names = ("modules_to_save", "target_modules", "exclude_modules", "layers_to_transform")
        values = {name: vars(self)[name] for name in names}
        for name in ("target_modules", "exclude_modules"):  # a bare name would not match a whole path as a regex
            if isinstance(values[name], str) and re.fullmatch(r"[\w.]+", values[name]):
                values[name] = [values[name]]
        return values

    @property
    def rate(self) -> float:
        """Return the peak learning rate; for `auto` the method's default.

        A careful one stands for `auto` where no AdamW steps, or roles have rates of their own.
        """
        if self.learning_rate != "auto":
            return self.learning_rate
        one = self.lr_ratio is None and self.core_ratio is None
        known = one and self.step == "backward" and self.optim.startswith("adam")
        rate = default_rate(self.method) if known else UNKNOWN
        new_head = find_model_class(self.task).new_head
        return rate.new_head or rate.value if new_head else rate.value

    @property
    def optim(self) -> str:
        """Return the optimiser's name."""
        return self.optimizer or ("adamw_torch" if self.step == "backward" else "sgd")

    def zeroth(self) -> ZerothOrder | None:
        """Return the gradient estimator for steps without a backward pass; None for `step: backward`.

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

    @cached_property
    def base_model(self) -> BaseModel:
        """Return the base model that the run trains or adapts; what is read of it is read once."""
        return BaseModel(self.model, self.revision, self.trust_remote_code)

    @property
    def kept(self) -> str:
        """Return the name of the subfolder, within the run folder, that holds what was trained."""
        return "model" if self.method == FULL else "adapter"

    def run_folder(self) -> Path:
        """Return the run's folder: `output`, or the first of runs/<model>-<method>, -2, -3, ... that is free."""
        if self.output:
            return user_path(self.output)
        name = Path("runs") / f"{Path(self.model).name}-{self.method.replace(':', '-')}"
        others = (name.with_name(f"{name.name}-{i}") for i in itertools.count(2))
        return next(path for path in itertools.chain([name], others) if not path.exists())

    def resolved(self, **settled: Any) -> Recipe:
        """Return this recipe with a method's defaults written out, and with the fields that the run `settled`."""
        settled = {"learning_rate": self.rate, **settled}
        if not is_inlay(self.method):
            return replace(self, **settled)
        method = self.config().build()
        args = {f.name: vars(method)[f.name] for f in fields(method) if f.name not in ("scale", "dropout")}
        return replace(self, args=args, **settled)

    def to_yaml(self) -> str:
        """Return every field as YAML."""
        return yaml.safe_dump(by_key(self, asdict(self)), sort_keys=False, allow_unicode=True)

    def differences(self) -> str:
        """Return the fields that differ from the defaults, as YAML."""
        defaults = {f.name: default_of(f) for f in fields(self)}
        changed = {name: vars(self)[name] for name in defaults if vars(self)[name] != defaults[name]}
        return yaml.safe_dump(by_key(self, changed))


def by_key(recipe: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """Return values of fields by their keys in YAML."""
    return {yaml_key(f): values[f.name] for f in fields(recipe) if f.name in values}


def check_inlay_only(recipe: Recipe) -> None:
    """Refuse fields that only Inlay's methods have, where the method is PEFT's or full fine-tuning."""
    if is_inlay(recipe.method):
        return
    full = recipe.method == FULL
    names = ["scale", "dropout", "patterns", "bias", "saver", "experts", "lr_ratio", "core_ratio"]
    names += ["flat_noise"]
    if full:
        names += ["args", "modules_to_save"]
    for f in fields(recipe):
        value = vars(recipe)[f.name]
        if f.name in names and value != default_of(f):
            hint = "it trains the whole model" if full else "give the fields of PEFT's config under args"
            raise ValueError(f"{f.name}={value!r} is not for method {recipe.method}; {hint}")
    if recipe.quantize == "nf4" or (full and recipe.quantize != "none"):
        allowed = "none" if full else "nf4_offset"
        raise ValueError(f"quantize: {recipe.quantize} is not for method {recipe.method}; {allowed} is")


STEPS = {  # kind of step: its `step_args`
    "backward": (),
    "mezo": ("epsilon", "queries", "batched"),
    "subzero": ("epsilon", "queries", "batched", "rank", "renew"),
}


def check_step(recipe: Recipe) -> None:
    """Refuse settings of the optimiser step that are invalid or exclude each other."""
    recipe.zeroth()
    check_optimizer(recipe.optim, recipe.method == FULL, recipe.optimizer_args)
    if recipe.step != "backward" and recipe.method == FULL:
        raise ValueError(
            f"step: {recipe.step} keeps a copy of the trained parameters, so it is for adapters, not for full"
        )
    if recipe.step != "backward" and recipe.gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing: step {recipe.step} has no backward pass to save memory for")
    if recipe.step != "backward" and recipe.saver != "none":
        raise ValueError(f"saver: step {recipe.step} has no backward pass to keep activations for")
    if recipe.step != "backward" and is_inlay(recipe.method) and find(recipe.method).penalty is not Method.penalty:
        raise ValueError(f"step: {recipe.step} looks at losses alone, and method {recipe.method} has a penalty beside")
    alone = recipe.task in ("instruction", "language_modelling") and not recipe.packing
    if recipe.step_args.get("batched") and not alone:
        raise ValueError("step_args: batched is for tasks instruction and language_modelling without packing")
    for name in ("lr_ratio", "core_ratio"):
        if (ratio := vars(recipe)[name]) is not None and ratio <= 0:
            raise ValueError(f"{name}: {ratio} is not above 0")


def check_attention(recipe: Recipe) -> None:
    """Refuse an attention that would not be used, and a batch planned for another one."""
    if recipe.quantize == "nf4" and recipe.attention != "auto":
        raise ValueError(f"attention: {recipe.attention} is not for quantize: nf4 (a fold); leave it out")
    if recipe.attention == "eager" and recipe.batch_size == "auto":
        raise ValueError("attention: eager keeps all scores, which batch_size: auto does not plan; give a number")
    if recipe.attention.startswith("flash") and recipe.dtype == "float32":
        raise ValueError(f"attention: {recipe.attention} computes in 16 bits, not in dtype: float32")


def check_task(recipe: Recipe) -> None:
    """Refuse fields that the task does not use, and those that are for causal language models alone."""
    if recipe.group_by_length is True and (reason := why_no_groups(recipe)):
        raise ValueError(f"group_by_length: {reason}; leave it out")
    if recipe.packing and recipe.task != "instruction":
        raise ValueError(f"packing is for task instruction, not {recipe.task}; leave it out")
    every = sources(recipe)
    if any(source.system is not None for source in every) and recipe.task in ("classification", "language_modelling"):
        raise ValueError(f"system: task {recipe.task} has no prompt for a system message; leave it out")
    if any(source.path == "builtin" for source in every) and recipe.task not in ("instruction", "seq2seq", "grpo"):
        raise ValueError(f"data: the built-in slice of E2E is not for task {recipe.task}; name a file")
    check_chat(recipe)
    if recipe.task == "instruction":
        return
    if recipe.streaming:
        raise ValueError(f"streaming is for task instruction, not {recipe.task}; leave it out")
    if recipe.task == "vision" and is_inlay(recipe.method) and find(recipe.method).needs:
        raise ValueError(f"method {recipe.method} starts from data, which task vision does not provide; choose another")
    if recipe.quantize == "nf4":
        raise ValueError(f"quantize: nf4 (folded) is for task instruction; {recipe.task} takes nf4_offset or int8")
    kind = find_model_class(recipe.task)
    if recipe.batch_size == "auto" and not kind.planned:
        raise ValueError(f"batch_size: auto is not planned for task {recipe.task}; give a number")
    if is_own_optimizer(recipe.optim) and not kind.any_optimizer:
        raise ValueError(
            f"optimizer: trl's trainer of task {recipe.task} takes only transformers' optimisers, not {recipe.optim}; "
            "leave it out"
        )
    if recipe.task == "grpo":
        check_rewards(recipe)
    if recipe.task == "vision" and recipe.allocate in ("variance", "blocks"):
        raise ValueError(f"allocate: {recipe.allocate} reads data, which task vision does not provide; take energy")


def check_rewards(recipe: Recipe) -> None:
    """Refuse settings of task grpo that are invalid or exclude each other."""
    if recipe.reward is None:
        raise ValueError(f"reward: task grpo needs one; accepted: {ACCEPTED}")
    reward_terms(recipe.reward)
    answers, group = int(recipe.batch_size) * recipe.accumulation, recipe.num_generations
    if answers % group:
        raise ValueError(
            f"num_generations: {group} does not divide the {answers} answers of a step (batch_size × accumulation); "
            f"take batch_size {group}, or a multiple"
        )
    if recipe.temperature <= 0:
        raise ValueError(f"temperature: {recipe.temperature} draws the same answer each time; take one above 0")
    if recipe.max_new_tokens >= recipe.max_length:
        raise ValueError(
            f"max_new_tokens: {recipe.max_new_tokens} leaves no room for a prompt within max_length="
            f"{recipe.max_length}; raise max_length"
        )
    if recipe.step != "backward":
        raise ValueError(
            f"step: {recipe.step} looks at losses alone, and task grpo learns from gradients; leave it out"
        )
    for key in OF_RUN:
        if key in recipe.trainer:
            raise ValueError(f"trainer: a run of task grpo with {key!r} could not be resumed exactly; leave it out")
    for key in recipe.trainer:
        if key.startswith(("use_vllm", "vllm_", "use_transformers_")):
            raise ValueError(f"trainer: {key}: task grpo generates with transformers alone; leave it out")


PREPARED = {  # keys of trl's configs for data and models that trl prepares; here it gets tokens, labels and a model
    "completion_only_loss": "only answers are learned; task language_modelling learns all of a text",
    "assistant_only_loss": "only answers are learned",
    "chat_template_path": "use chat_template",
    "model_init_kwargs": "the recipe loads the model; dtype, revision and quantize are fields",
    "padding_free": "use packing: true, which leaves no padding",
    "truncation_mode": "rows are truncated at their end; shorten them in the data",
    "dataset_text_field": "use columns: {text: ...}",
    "dataset_kwargs": "the data is prepared already",
}


def check_chat(recipe: Recipe) -> None:
    """Refuse settings of conversations for tasks without any, and keys by which trl would change the prepared data."""
    tasks = {
        "answers": ("instruction",),
        "unlabelled": ("classification",),
        "reward": ("grpo",),
        "num_generations": ("grpo",),
        "temperature": ("grpo",),
        "max_new_tokens": ("grpo",),
        "chat_template": CHAT_TASKS,
        "chat_template_kwargs": CHAT_TASKS,
    }
    for f in fields(recipe):
        if recipe.task not in tasks.get(f.name, (recipe.task,)) and vars(recipe)[f.name] != default_of(f):
            raise ValueError(f"{f.name} is for task {' or '.join(tasks[f.name])}, not {recipe.task}; leave it out")
    for key, hint in PREPARED.items():
        if key in recipe.trainer and recipe.task in (*CHAT_TASKS, "language_modelling"):
            raise ValueError(f"trainer: {key} has no effect; {hint}")


def why_no_groups(recipe: Recipe) -> str | None:
    """Return why examples have no lengths to be grouped by: these are all the same, or not known."""
    reasons = {
        "packing fills every sequence": recipe.packing,
        "a stream is read in its own order": recipe.streaming,
        "all blocks of task language_modelling are of one length": recipe.task == "language_modelling",
        "task kto pairs each answer with its neighbours' prompts, in the order of the batches": recipe.task == "kto",
        "task grpo draws its answers itself": recipe.task == "grpo",
        "task vision does not know how long an image is": recipe.task == "vision",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def check_allocate(recipe: Recipe) -> None:
    """Refuse to allocate ranks where the method has none, or where `patterns` sets them already."""
    if recipe.patterns:
        raise ValueError(f"allocate={recipe.allocate} sets patterns itself; remove one of the two")
    if (recipe.allocate == "blocks") != (recipe.method == "smt"):
        raise ValueError(
            f"allocate={recipe.allocate} is not for method {recipe.method}; smt allocates blocks, all others ranks"
        )
    if "r" not in [f.name for f in fields(find(recipe.method))]:
        raise ValueError(
            f"allocate={recipe.allocate}: {recipe.method} has no rank r; set allocate: none or choose a method with r"
        )
