"""Load the model that a run trains."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from inlay.conversion.fold import fold
from inlay.models.adapters import Adapter
from inlay.models.folded import START, fold_at
from inlay.models.model_classes import find_model_class
from inlay.models.quantized import quantization_config
from inlay.recipe.peft_methods import FULL
from inlay.recipe.recipe import Recipe
from inlay.training.arguments import attention_settings
from inlay.training.checkpoints import Checkpoint
from inlay.training.examples import Examples
from inlay.training.prepared import Prepared
from inlay.training.tasks import TASKS


def check_fold(recipe: Recipe, adapter: Path) -> None:
    """Refuse to train a folded model with another method than the one it was folded for."""
    wanted = recipe.config().to_dict()
    folded = Adapter.open(adapter).config.to_dict()
    names = ["method", "args", "scale", "dropout", "patterns"]
    names += ["bias", "modules_to_save", "exclude_modules", "layers_to_transform"]
    if recipe.target_modules != "all-linear":  # else all modules that were folded
        names.append("target_modules")
    for name in names:
        if wanted[name] != folded[name]:
            raise ValueError(
                f"{recipe.model} was folded with {name}={folded[name]}, which is fixed; this recipe has {wanted[name]}"
            )
    if recipe.quantize != "none":
        raise ValueError(f"{recipe.model} is folded already; leave out quantize: {recipe.quantize}")


def model_of(recipe: Recipe, rows: Examples | None) -> dict[str, Any]:
    """Return the class of a recipe's model as `auto`, and what of its configuration the examples settle."""
    settings = {} if rows is None else TASKS[recipe.task].model_settings(rows)
    return {"auto": find_model_class(recipe.task).auto, **settings}


def load_training_model(
    prepared: Prepared, checkpoint: Checkpoint | None = None, batches: Iterable[Any] | None = None
) -> PreTrainedModel | PeftModel:
    """Load the model that a recipe trains, quantised if it says so.

    A fold is written into `folder`/base and returned adapted; a resumed run takes its base from there.

    Args:
        prepared: the run or trial.
        checkpoint: the one that the run resumes from.
        batches: for folds that start from data.
    """
    recipe, dtype = prepared.recipe, prepared.dtype
    folder, console = prepared.folder, prepared.console
    if recipe.quantize == "nf4" and checkpoint:
        return Adapter.open(checkpoint.path, str(folder / "base")).load(dtype, trainable=True)[0]
    if adapter := fold_at(recipe.model):
        check_fold(recipe, adapter)
        return Adapter.open(adapter).load(dtype, trainable=True)[0]
    dtype = torch.float32 if recipe.method == FULL else dtype  # updates of full fine-tuning are too small for 16 bits
    if recipe.quantize != "nf4":
        quantization = None if recipe.quantize == "none" else quantization_config(recipe.quantize, dtype)
        settings = {**model_of(recipe, prepared.rows), **attention_settings(recipe)}
        return prepared.base.load(dtype, quantization, **settings)
    result = fold(
        recipe.model, folder / "folded", recipe.config(), rounds=recipe.fold_rounds, batches=batches,
        revision=recipe.revision, trust_remote_code=recipe.trust_remote_code,
    )  # fmt: skip
    plain = statistics.mean(error.plain for error in result.errors)
    folded = statistics.mean(error.folded for error in result.errors)
    console.print(f"folded: the base starts at a relative error of {folded:.4f} per weight (plain NF4: {plain:.4f})")
    if result.unsettled:
        console.print(f"{len(result.unsettled)} layers' starts had not settled; --calibration gives more batches")
    model = Adapter.open(result.adapter, str(result.base)).load(dtype, trainable=True)[0]
    for path in (result.base, result.folder / "errors.csv"):
        path.rename(folder / path.name)
    result.adapter.rename(folder / START)
    shutil.rmtree(result.folder)
    model.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    return model
