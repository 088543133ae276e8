"""Settle a prepared run: decide what the recipe leaves to the model and the data, and build the trainer."""

from __future__ import annotations

from dataclasses import replace

from transformers import set_seed

from inlay.host import distributed
from inlay.training import checkpoints
from inlay.training.allocate_ranks import settle_ranks
from inlay.training.base_model import load_training_model
from inlay.training.calibration import calibration_batches, settle_calibration, settle_experts, start_from_data
from inlay.training.checkpoints import Checkpoint
from inlay.training.fit import build_trainer
from inlay.training.prepared import Prepared
from inlay.training.trainers.trainer import Trainer


def settle(prepared: Prepared, checkpoint: Checkpoint | None = None) -> tuple[Prepared, Trainer]:
    """Allocate ranks, load the base and adapt it, for a run and for a trial alike.

    Args:
        prepared: the run or trial.
        checkpoint: the one that a run resumes from.

    Returns:
        The run with its recipe settled, and the trainer, whose adapter has its start.

    Raises:
        ValueError: the model or the data cannot be used.
    """
    chosen = replace(prepared, recipe=distributed.from_first(lambda: settle_experts(prepared)))
    ranks = distributed.from_first(lambda: settle_ranks(chosen.recipe, chosen.base, chosen.rows, chosen.console))
    ranked = replace(chosen, recipe=ranks)
    settled = replace(ranked, recipe=distributed.from_first(lambda: settle_calibration(ranked)))
    set_seed(settled.recipe.seed)
    base = load_training_model(settled, checkpoint, calibration_batches(settled))
    checksum = checkpoints.base_mark(base)  # before some of PEFT's starts change the base itself
    trainer = build_trainer(settled, base)
    trainer.base = checksum
    if checkpoint is None:
        start_from_data(settled, trainer.model)
    return settled, trainer
