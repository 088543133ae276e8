"""Find the largest batch that fits into memory."""

from __future__ import annotations

import torch

from inlay.models.base import BaseModel
from inlay.models.folded import fold_at
from inlay.models.sizes import free_memory
from inlay.planning.planner import PlannedRun
from inlay.recipe.peft_methods import FULL, without_start
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples


def largest_useful_batch(rows: Examples, processes: int = 1) -> int:
    """Return the largest useful batch: a power of two that leaves eight steps per epoch, at most 64."""
    return min(64, 1 << max(0, (len(rows.train) // processes // 8).bit_length() - 1))


def planned_step(recipe: Recipe, base: BaseModel, rows: Examples, dtype: torch.dtype) -> tuple[PlannedRun, int]:
    """Return the planner's run as it will train on this machine, and the length of its longest sequence.

    As many positions have a label as in the sequence with the most of them.
    """
    length = min(recipe.max_length, rows.audit.longest)
    dtype = torch.float32 if recipe.method == FULL else dtype
    run = PlannedRun(
        base, without_start(recipe.adapter()), dtype,
        "nf4" if fold_at(recipe.model) else recipe.quantize,
        recipe.gradient_checkpointing, "cuda" if torch.cuda.is_available() else "cpu",
        labelled_share(recipe, rows, length),
    )  # fmt: skip
    return run, length


def labelled_share(recipe: Recipe, rows: Examples, length: int) -> float:
    """Return the largest share of `length` tokens that have a label in any sequence; 1 where the head sees all."""
    everywhere = recipe.packing or any(recipe.trainer.get(key) for key in ("label_smoothing_factor", "torch_compile"))
    learned = rows.audit.most_learned
    return 1.0 if everywhere or not learned else min(1.0, learned / length)


def fitting_batch(run: PlannedRun, length: int, most: int, loaded: bool) -> int:
    """Return the largest power of two, at most `most`, whose step fits the free memory; 1 if none does.

    Weights that are `loaded` already need no further memory.
    """
    room = 0.8 * free_memory() + (run.step(1, length).frozen if loaded else 0.0)
    return min(most, 1 << max(0, run.largest_batch(length, room).bit_length() - 1))
