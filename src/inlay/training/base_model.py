"""Load the model that a run trains."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from inlay.conversion.fold import fold
from inlay.models.adapters import load_adapted, read_adapter_config
from inlay.models.folded import START, fold_at
from inlay.models.loading import load_model
from inlay.models.model_classes import find_model_class
from inlay.recipe.peft_methods import FULL
from inlay.recipe.recipe import Recipe
from inlay.training.checkpoints import Checkpoint


def check_fold(recipe: Recipe, adapter: Path) -> None:
    """Refuse to train a folded model with another method than the one it was folded for."""
    wanted = recipe.config().to_dict()
    folded = read_adapter_config(adapter).to_dict()
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


def load_training_model(
    recipe: Recipe,
    dtype: torch.dtype,
    folder: Path,
    console: Console,
    checkpoint: Checkpoint | None = None,
    batches: Iterable[Any] | None = None,
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """Load the model that a recipe trains, quantised if it says so.

    A fold is written into `folder`/base and returned adapted; a resumed run takes its base from there.

    Args:
        recipe: of the run.
        dtype: of the base.
        folder: of the run.
        console: for messages.
        checkpoint: the one that the run resumes from.
        batches: for folds that start from data.
        settings: of the model's configuration.
    """
    from inlay.models.quantized import quantization_config

    if recipe.quantize == "nf4" and checkpoint:
        return load_adapted(checkpoint.path, str(folder / "base"), dtype, trainable=True)[0]
    if adapter := fold_at(recipe.model):
        check_fold(recipe, adapter)
        return load_adapted(adapter, dtype=dtype, trainable=True)[0]
    options = (recipe.revision, recipe.trust_remote_code)
    dtype = torch.float32 if recipe.method == FULL else dtype  # updates of full fine-tuning are too small for 16 bits
    if recipe.quantize != "nf4":
        quantization = None if recipe.quantize == "none" else quantization_config(recipe.quantize, dtype)
        auto = find_model_class(recipe.task).auto
        return load_model(recipe.model, dtype, *options, quantization, auto=auto, **settings)
    result = fold(
        recipe.model, folder / "folded", recipe.config(), rounds=recipe.fold_rounds, batches=batches,
        revision=options[0], trust_remote_code=options[1],
    )  # fmt: skip
    plain = statistics.mean(error.plain for error in result.errors)
    folded = statistics.mean(error.folded for error in result.errors)
    console.print(f"folded: the base starts at a relative error of {folded:.4f} per weight (plain NF4: {plain:.4f})")
    if result.unsettled:
        console.print(f"{len(result.unsettled)} layers' starts had not settled; --calibration gives more batches")
    model = load_adapted(result.adapter, str(result.base), dtype, trainable=True)[0]
    for path in (result.base, result.folder / "errors.csv"):
        path.rename(folder / path.name)
    result.adapter.rename(folder / START)
    shutil.rmtree(result.folder)
    model.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    return model
