"""Hold what a run, or a trial of many, consists of once its data is read and before its model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from inlay.models.base import BaseModel
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples


@dataclass(frozen=True)
class Prepared:
    """Hold a run or a trial whose data is read and whose model is not loaded yet.

    Attributes:
        recipe: what is trained and how.
        base: the recipe's base model.
        dtype: that the base is loaded in.
        folder: of the run or trial.
        tokenizer: of the base; a processor, where it sees images.
        rows: the examples to train on and those held out.
        console: where progress is printed.
    """

    recipe: Recipe
    base: BaseModel
    dtype: torch.dtype
    folder: Path
    tokenizer: Any
    rows: Examples
    console: Console
