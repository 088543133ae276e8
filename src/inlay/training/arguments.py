"""Convert a recipe to the arguments of its task's trainer."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from inlay.host import distributed
from inlay.messages import check_installed, did_you_mean, first_line
from inlay.models.base import BaseModel
from inlay.models.folded import fold_at
from inlay.models.model_classes import find_model_class
from inlay.recipe.optimizers import optimizer_settings
from inlay.recipe.peft_methods import ADALORA, FULL
from inlay.recipe.recipe import Recipe
from inlay.training import checkpoints
from inlay.training.tasks import TASKS

NO_WAY_BACK = "AdaLoRA prunes parameters, so its runs cannot be resumed"

INEXACT = ("save_only_model", "ignore_data_skip")  # with these a resumed run would not end the same


def training_arguments(recipe: Recipe, folder: Path, batch: int, steps: int, dtype: torch.dtype) -> Any:
    """Return a recipe as the arguments of its task's trainer, such as trl's SFTConfig for instructions.

    Args:
        recipe: of the run.
        folder: of the run.
        batch: examples per device.
        steps: optimiser steps of the whole run.
        dtype: of the base.

    Raises:
        ValueError: a value, or a key of `trainer`, that trl or transformers refuse.
    """
    arguments = TASKS[recipe.task].arguments
    values = argument_values(recipe, folder, batch, steps, dtype)
    if distributed.process_count() > 1:
        values["accelerator_config"] = {"use_configured_state": True}  # as `distributed.joined` configured it
    for key in recipe.trainer:
        check_extra(key, values, arguments)
    try:
        return arguments(**{**values, **recipe.trainer})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the trainer refuses this recipe: {first_line(error)}") from None


def argument_values(recipe: Recipe, folder: Path, batch: int, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return what fields of a recipe say to its trainer, by the names of the trainer's arguments."""
    evaluating = recipe.eval_every
    saving = steps_between_checkpoints(recipe, steps)
    return {
        "output_dir": str(folder / checkpoints.FOLDER),
        "learning_rate": recipe.rate,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.steps or -1,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": recipe.accumulation,
        "lr_scheduler_type": recipe.scheduler,
        "warmup_steps": warmup_steps(recipe, steps),
        "weight_decay": recipe.weight_decay,
        **optimizer_settings(recipe.optim, recipe.optimizer_args, recipe.target_modules),
        "max_grad_norm": recipe.max_grad_norm if recipe.step == "backward" else 0.0,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        # An adapted base is loaded in its compute dtype and θ stays fp32: autocast would only add casts.
        "bf16": recipe.method == FULL and dtype == torch.bfloat16,
        # For its loss scaling, which only a backward pass needs.
        "fp16": dtype == torch.float16 and torch.cuda.is_available() and recipe.step == "backward",
        "eval_strategy": "steps" if evaluating else "no",
        "eval_steps": evaluating,
        "save_strategy": "steps" if saving else "no",
        "save_steps": saving or 500,
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,  # early stopping continues its count
        "load_best_model_at_end": bool(recipe.keep_best or recipe.early_stopping),
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": 1,
        "train_sampling_strategy": "group_by_length" if recipe.group_by_length is True else "random",
        "report_to": recipe.report_to,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_broadcast_buffers": False,  # θ₀ and frozen factors, equal from the start
        **TASKS[recipe.task].settings(recipe),
    }


def optimizer_steps(recipe: Recipe, examples: int, batch: int) -> int:
    """Return the optimiser steps of a run over so many examples, as transformers will count them."""
    if recipe.task == "grpo":  # prompts, of which a step takes whole groups
        prompts = batch * recipe.accumulation * distributed.process_count() // recipe.num_generations
        return recipe.steps or math.ceil(recipe.epochs * max(1, examples // prompts))
    batches = math.ceil(examples / (batch * distributed.process_count()))
    return recipe.steps or math.ceil(recipe.epochs * math.ceil(batches / recipe.accumulation))


def warmup_steps(recipe: Recipe, steps: int) -> float:
    """Return the steps over which the learning rate rises, in a run of `steps`."""
    return recipe.warmup if recipe.warmup >= 1 else min(math.ceil(recipe.warmup * steps), steps - 1)


def steps_between_checkpoints(recipe: Recipe, steps: int) -> int:
    """Return how many steps there are between checkpoints, in a run of `steps`; 0 where there are none.

    Raises:
        ValueError: checkpoints are requested of a method that cannot resume.
    """
    if recipe.method == ADALORA:
        if recipe.save_every or recipe.keep_best or recipe.early_stopping:
            raise ValueError(f"{recipe.method}: {NO_WAY_BACK}; leave out save_every, keep_best and early_stopping")
        return 0
    if recipe.keep_best or recipe.early_stopping:
        return recipe.eval_every or 0
    return math.ceil(steps / 10) if recipe.save_every is None else recipe.save_every


def settle_steps(recipe: Recipe, trainer: Any) -> None:
    """Count what a recipe says in shares of a run by the examples that a trainer was left with.

    trl packs them, and drops those whose answer is cut off wholly.
    """
    batch = trainer.args.per_device_train_batch_size
    steps = optimizer_steps(recipe, len(trainer.train_dataset), batch)
    trainer.args.warmup_steps = warmup_steps(recipe, steps)
    trainer.args.save_steps = steps_between_checkpoints(recipe, steps) or trainer.args.save_steps
    if recipe.method == ADALORA:
        schedule, settled = trainer.model.peft_config["default"], recipe.adapter(steps)
        for name in ("total_step", "tinit", "tfinal"):
            setattr(schedule, name, getattr(settled, name))


def check_means(recipe: Recipe) -> None:
    """Refuse what this machine has not the packages or the GPU for, before anything is read or loaded."""
    if recipe.quantize != "none":
        check_installed(f"quantize: {recipe.quantize}", "bitsandbytes")
    if recipe.task == "vision":
        check_installed("task: vision", "PIL")
    if recipe.trainer.get("use_liger_kernel"):
        check_installed("trainer: use_liger_kernel", "liger_kernel")
    for key in ("use_liger_kernel", "activation_offloading"):
        if recipe.trainer.get(key) and not torch.cuda.is_available():
            raise ValueError(f"trainer: {key} is for a GPU, and this machine has none; leave it out")
    if recipe.trainer.get("use_liger_kernel"):
        check_liger(recipe.base_model)
    if recipe.attention != "auto":
        check_attention_runs(recipe)
    check_tracker(recipe.report_to)
    check_arguments(recipe)


def check_arguments(recipe: Recipe) -> None:
    """Refuse a scheduler that there is none of, and keys of `trainer` that its arguments do not take."""
    schedulers = [kind.value for kind in SchedulerType]
    if recipe.scheduler not in schedulers:
        raise ValueError(f"scheduler: {recipe.scheduler!r} is not one of {', '.join(schedulers)}")
    values = argument_values(recipe, Path(), 1, recipe.steps or 1, torch.float32)
    for key in recipe.trainer:
        check_extra(key, values, TASKS[recipe.task].arguments)


def check_liger(base: BaseModel) -> None:
    """Refuse Liger's kernels for a model that they do not know, which transformers would train without a word."""
    from liger_kernel.transformers.monkey_patch import (  # type: ignore[import-not-found]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    if (kind := base.config().model_type) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"trainer: use_liger_kernel has no kernels for {kind} models; leave it out")


def check_attention_runs(recipe: Recipe) -> None:
    """Refuse an attention that this machine or the model lacks, as transformers says before weights are read."""
    gpu = recipe.attention.startswith("fl")  # flash_attention_2 and 3, flex_attention
    if gpu and not torch.cuda.is_available():
        raise ValueError(f"attention: {recipe.attention} is for a GPU, and this machine has none; leave it out")
    if fold_at(recipe.model):
        raise ValueError(f"attention: {recipe.attention} is not for a folded base; leave it out")
    try:
        auto = find_model_class(recipe.task).auto
        recipe.base_model.meta(torch.bfloat16, layers=1, auto=auto, **attention_settings(recipe))
    except ValueError as error:
        raise ValueError(f"attention: {recipe.attention}: {error}") from None


def attention_settings(recipe: Recipe) -> dict[str, str]:
    """Return the values of a model's configuration that set its attention."""
    return {} if recipe.attention == "auto" else {"attn_implementation": recipe.attention}


def check_tracker(names: str) -> None:
    """Refuse a tracker that transformers does not know or that is not installed."""
    trackers = sorted({*INTEGRATION_TO_CALLBACK, "all", "none"})
    for name in names.split(","):
        if name not in trackers:
            raise ValueError(f"report_to: {name!r} is not one of {', '.join(trackers)}")
        if name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: {name} is not installed; pip install {name}")


def check_extra(key: str, values: dict[str, Any], arguments: type) -> None:
    """Refuse a key of `trainer` that the trainer's arguments do not have, or that the recipe sets itself."""
    names = [f.name for f in fields(arguments)]
    if key not in names:
        raise ValueError(f"trainer: {arguments.__name__} has no {key!r}; {did_you_mean(key, names)}")
    if key in INEXACT:
        raise ValueError(f"trainer: a run with {key!r} could not be resumed exactly; leave it out")
    if key in values and key not in ("logging_steps", "save_total_limit", "per_device_eval_batch_size", "eval_packing"):
        raise ValueError(f"trainer: {key!r} is set from fields of the recipe; use these")
