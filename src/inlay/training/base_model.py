"""The model that a run trains."""

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
from inlay.models.adapters import Adapter
from inlay.models.folded import START, fold_at
from inlay.models.model_classes import find_model_class
from inlay.recipe.peft_methods import FULL
from inlay.recipe.recipe import Recipe
from inlay.training.checkpoints import Checkpoint


def check_fold(recipe: Recipe, adapter: Path) -> None:
    """Refuse to train a fold as another method than the one it was made with."""
    asked, made = recipe.config().to_dict(), Adapter.open(adapter).config.to_dict()
    names = ["method", "args", "scale", "dropout", "patterns"]
    names += ["bias", "modules_to_save", "exclude_modules", "layers_to_transform"]
    names += ["target_modules"] if recipe.target_modules != "all-linear" else []  # all that were folded
    for name in names:
        if asked[name] != made[name]:
            raise ValueError(
                f"{recipe.model} was folded with {name}={made[name]}, which is fixed; this recipe says {asked[name]}"
            )
    if recipe.quantize != "none":
        raise ValueError(f"{recipe.model} is folded already; leave out quantize: {recipe.quantize}")


def load_training_model(
    recipe: Recipe,
    dtype: torch.dtype,
    folder: Path,
    console: Console,
    found: Checkpoint | None = None,
    batches: Iterable[Any] | None = None,
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """The model a recipe trains, quantised if it says so; `batches`: for folds that start from data; `settings`: of its
    configuration. After a fold, into
    `folder`/base, it is adapted already, and a run that goes on takes its base from there."""
    from inlay.models.quantized import quantization_config

    if recipe.quantize == "nf4" and found:
        return Adapter.open(found.path, str(folder / "base")).load(dtype, trainable=True)[0]
    if adapter := fold_at(recipe.model):
        check_fold(recipe, adapter)
        return Adapter.open(adapter).load(dtype, trainable=True)[0]
    dtype = torch.float32 if recipe.method == FULL else dtype  # its updates are too small for 16 bits
    if recipe.quantize != "nf4":
        quantization = None if recipe.quantize == "none" else quantization_config(recipe.quantize, dtype)
        auto = find_model_class(recipe.task).auto
        return recipe.base_model().load(dtype, quantization, auto=auto, **settings)
    made = fold(
        recipe.model, folder / "folded", recipe.config(), rounds=recipe.fold_rounds, batches=batches,
        revision=recipe.revision, trust_remote_code=recipe.trust_remote_code,
    )  # fmt: skip
    plain, folded = (statistics.mean(getattr(e, kind) for e in made.errors) for kind in ("plain", "folded"))
    console.print(f"folded: the base starts at a relative error of {folded:.4f} per weight (plain NF4: {plain:.4f})")
    if made.unsettled:
        console.print(f"{len(made.unsettled)} layers' starts had not settled; --calibration gives more batches")
    model = Adapter.open(made.adapter, str(made.base)).load(dtype, trainable=True)[0]
    for path in (made.base, made.folder / "errors.csv"):
        path.rename(folder / path.name)
    made.adapter.rename(folder / START)
    shutil.rmtree(made.folder)
    model.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    return model
