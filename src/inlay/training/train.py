"""Train one run: from a recipe, through the trainer of its task, to a run folder."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from inlay.files.atomic import check_free, find_again, locked, put_back, write_text
from inlay.files.untrusted import regular_files
from inlay.host import distributed
from inlay.messages import AfterTrainingError, Terminal, dtype_name, first_line
from inlay.models.loading import dtype_for
from inlay.recipe.peft_methods import ADALORA, FULL
from inlay.recipe.reading import load_recipe
from inlay.recipe.recipe import Recipe
from inlay.reports.result import Result
from inlay.training import checkpoints
from inlay.training.arguments import NO_WAY_BACK, check_means
from inlay.training.checkpoints import Checkpoint
from inlay.training.fit import BEFORE, fit_steps, measure, predicted_memory
from inlay.training.hub import claim_repository, upload_run
from inlay.training.prepared import Prepared
from inlay.training.run_files import PAGE, write_page, write_trained
from inlay.training.run_folder import MARK, give_up, start_folder, tidy
from inlay.training.settle import settle
from inlay.training.tasks import TASKS
from inlay.training.trainers.deepspeed_zero3 import check_zero3
from inlay.training.trainers.trainer import Trainer


def train(recipe: Recipe, console: Console | None = None, resume: bool = False) -> Result:
    """Run a recipe and write its run folder, or resume the run at its `output` (see `unfinished`).

    Args:
        recipe: of the run.
        console: for messages.
        resume: continue from the newest whole checkpoint.

    Raises:
        ValueError: the recipe, the data or the output folder cannot be used, and nothing is then written; the run was
            made with something else; or it met NaN, Inf or a full disk, and can be resumed from its last checkpoint.
        AfterTrainingError: what was trained is saved, and something failed after that.
    """
    console = console or Terminal()
    console = console if distributed.is_first() else Console(quiet=True)
    folder = distributed.from_first(recipe.run_folder)
    with locked(folder) if distributed.is_first() else nullcontext():
        checkpoint = distributed.from_first(lambda: begin(recipe, folder, console, resume))
        task = TASKS[recipe.task]
        tokenizer = task.processor(recipe)
        rows = distributed.in_turn(lambda: task.examples(recipe, tokenizer, console))
        dtype = dtype_for(recipe.dtype)
        prepared = Prepared(recipe, recipe.base_model, dtype, folder, tokenizer, rows, console)
        distributed.from_first(lambda: None if checkpoint else start_folder(folder, recipe))
        try:
            prepared, trainer = settle(prepared, checkpoint)
            recipe = prepared.recipe.resolved(
                dtype=dtype_name(dtype),
                eval_size=rows.eval_size,
                batch_size=trainer.args.per_device_train_batch_size,
                group_by_length=trainer.args.train_sampling_strategy == "group_by_length",
                output=str(folder),
            )
            if distributed.is_first():
                write_text(folder / "recipe.yaml", recipe.to_yaml())
            result = fit_and_write(replace(prepared, recipe=recipe), trainer, checkpoint)
        except BaseException:
            if distributed.is_first() and give_up(folder):
                hint = "" if recipe.method == ADALORA else f"; to resume it: inlay train --resume {folder}"
                console.print(f"the checkpoints so far are kept{hint}")
            raise
        console.print(f"run folder: {folder}; open {folder / PAGE} in a browser")
        if distributed.is_first():
            finish_run(recipe, folder, console)
    return result


def begin(recipe: Recipe, folder: Path, console: Console, resume: bool) -> Checkpoint | None:
    """Check that a run can begin, and return the checkpoint that it resumes from, if any."""
    check_engine(recipe)
    put_back(folder)
    check_free(folder, recipe.overwrite or resume, MARK)
    if resume and recipe.method == ADALORA:
        raise ValueError(f"{recipe.method}: {NO_WAY_BACK}; start again with --overwrite")
    checkpoint = checkpoints.newest(folder / checkpoints.FOLDER, console) if resume else None
    if checkpoint:
        checkpoints.check_same(checkpoint, "recipe", checkpoints.learning_settings(recipe))
        checkpoints.check_same(checkpoint, "configuration", checkpoints.configuration(recipe.base_model))
        console.print(f"resuming from {checkpoint.path}")
    elif resume and (folder / recipe.kept).is_dir():
        raise ValueError(
            f"{folder / recipe.kept} is trained and saved, and there is no checkpoint to go on from; use it as it "
            "is, or start again with --overwrite"
        )
    check_means(recipe)
    if recipe.push_to_hub:
        claim_repository(recipe.push_to_hub)
    return checkpoint


def check_engine(recipe: Recipe) -> None:
    """Refuse what cannot be combined with several processes, or with a model that is sharded among them."""
    for key in ("fsdp", "fsdp_config", "deepspeed"):
        if key in recipe.trainer:
            raise ValueError(
                f"trainer: {key} is configured through accelerate: use --launch-config recipes/distributed/fsdp2.yaml"
            )
    if distributed.launched() and recipe.quantize == "nf4":
        raise ValueError(
            "quantize: nf4 folds in one process; run inlay fold first, then train with its folder as model"
        )
    if not distributed.sharded():
        return
    if distributed.deepspeed():
        check_zero3(recipe)
    if recipe.optim == "subspace_descent":
        raise ValueError("optimizer: subspace_descent projects whole matrices, which sharding divides; use DDP")
    if distributed.fsdp() and os.environ.get("FSDP_VERSION", "2") != "2":
        raise ValueError("fsdp_version: 1 is not supported; set it to 2, as recipes/distributed/fsdp2.yaml does")
    if distributed.fsdp() and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves most processes without weights to decompose; set it to false"
        )
    if recipe.method == FULL or recipe.quantize != "none" or recipe.keep_best or recipe.early_stopping:
        raise ValueError(
            "a sharded model takes no method: full, quantize, keep_best or early_stopping; use DDP for these"
        )


def unfinished(folder: Path, changed: dict[str, Any]) -> Recipe | None:
    """Return the recipe of the run in a folder, with the fields that the user `changed`; None if nothing is left to do.

    Raises:
        ValueError: there is no run, it is of another method (whose hyperparameters have other names), or it holds a
            link, through which it would write elsewhere.
    """
    folder = regular_files(find_again(folder.resolve()))
    if not (folder / MARK).exists() or not (folder / "recipe.yaml").exists():
        raise ValueError(f"{folder} holds no run to resume: it has no recipe.yaml of one")
    before = load_recipe(str(folder / "recipe.yaml"), {}, follow=False).method
    now = changed.get("method", before)
    if now != before:
        raise ValueError(f"{folder} is of another run: method was {before!r} and is {now!r}; start a new run for that")
    if link := next((path for path in folder.rglob("*") if path.is_symlink()), None):
        raise ValueError(f"{link} is a link, through which a run would write elsewhere; replace it by its target")
    recipe = load_recipe(str(folder / "recipe.yaml"), {**changed, "output": str(folder)}, follow=False)
    if not (folder / PAGE).exists():
        return recipe
    if (folder / BEFORE).exists() and not int(os.environ.get("RANK", 0)):
        with locked(folder):
            finish_run(recipe, folder, Terminal())
    return None


def fit_and_write(prepared: Prepared, trainer: Trainer, checkpoint: Checkpoint | None = None) -> Result:
    """Fit, and write everything into the run folder: first what was trained, then what is said of it.

    Raises:
        AfterTrainingError: what was trained is saved, and something failed after that.
    """
    fitted = fit_steps(prepared, trainer, checkpoint)
    model = cast(Any, trainer.model)
    state = distributed.whole_state(model) if trainer.sharded else None
    if distributed.is_first():
        write_trained(prepared.recipe, prepared.folder, model, state)
    try:
        result = measure(prepared, trainer, fitted)
        result.memory_planned = predicted_memory(prepared, trainer)
        if distributed.is_first():
            write_page(result, prepared.base, model, whole=state is None)
    except Exception as error:
        if distributed.lost(error) or isinstance(error, distributed.Elsewhere):
            raise
        kept = prepared.folder / prepared.recipe.kept
        raise AfterTrainingError(
            f"{kept} is trained and saved; its samples, its plots or its report could not be made: {first_line(error)}"
        ) from error
    return result


def finish_run(recipe: Recipe, folder: Path, console: Console) -> None:
    """Tidy up a run that is written, and upload it if requested."""
    tidy(folder)
    if recipe.push_to_hub:
        upload_run(folder / recipe.kept, recipe.push_to_hub)
        console.print(f"uploaded to {recipe.push_to_hub}")
    (folder / BEFORE).unlink(missing_ok=True)  # last: a report beside it means that this was not finished
