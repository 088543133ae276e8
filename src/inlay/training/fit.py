"""Build a run's trainer, and evaluate, train and evaluate with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, cast

from datasets import Dataset
from peft import PeftModel
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from inlay.files.atomic import write_text
from inlay.files.untrusted import read_regular
from inlay.host import distributed
from inlay.host.compute_starts import shared_starts
from inlay.host.flat_lora import Flat
from inlay.host.lora_plus import raised, role_ratios
from inlay.host.schedule import Schedule
from inlay.messages import duration, gib
from inlay.models import builtin
from inlay.models.loading import dtype_for
from inlay.models.model_classes import find_model_class
from inlay.models.sizes import count_trained_and_base, frozen_experts
from inlay.recipe.optimizers import check_shapes, own_optimizer
from inlay.recipe.peft_methods import is_inlay
from inlay.recipe.recipe import why_no_groups
from inlay.reports.result import Result, environment
from inlay.training import checkpoints
from inlay.training.arguments import optimizer_steps, settle_steps, training_arguments
from inlay.training.batch_size import fitting_batch, largest_useful_batch, planned_step
from inlay.training.checkpoints import Checkpoint
from inlay.training.examples import training_set
from inlay.training.peft_extras import complete_peft_method
from inlay.training.prepared import Prepared
from inlay.training.progress import RunProgress, peak_memory
from inlay.training.tasks import TASKS
from inlay.training.trainers.length_groups import PAYS, token_counts, tokens_spared
from inlay.training.trainers.trainer import Trainer

BEFORE = ".before.json"  # the answers before training, until the samples are written


@dataclass(frozen=True)
class Fitted:
    """Hold what is known of a run that has taken its steps: its metrics, and the numbers trained and in the base."""

    progress: RunProgress
    parameters: int
    base_parameters: int


def fit(prepared: Prepared, trainer: Trainer, checkpoint: Checkpoint | None = None) -> Result:
    """Evaluate, train and evaluate again, writing the metrics into the run folder on the way.

    Args:
        prepared: the run or trial, with its recipe settled.
        trainer: from `settle`.
        checkpoint: the one to resume from.
    """
    return measure(prepared, trainer, fit_steps(prepared, trainer, checkpoint))


def fit_steps(prepared: Prepared, trainer: Trainer, checkpoint: Checkpoint | None = None) -> Fitted:
    """Evaluate and train, as `fit` does."""
    recipe, rows = prepared.recipe, prepared.rows
    console = prepared.console
    folder, tokenizer = prepared.folder, prepared.tokenizer
    model = cast(Any, trainer.model)
    trainer.run = {
        "recipe": checkpoints.learning_settings(recipe),
        "identity": checkpoints.run_identity(trainer, rows, recipe, tokenizer),
        "versions": environment(),
        "configuration": checkpoints.configuration(prepared.base),
    }
    task = TASKS[recipe.task]
    progress = RunProgress(folder, console, task.metrics)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)
    parameters, base = count_trained_and_base(model)
    console.print(
        f"{recipe.method} on {builtin.model_name(recipe.model)} in {recipe.dtype}: {parameters:,} of "
        f"{base:,} parameters are trained ({parameters / base:.2%})"
    )
    if line := frozen_experts(model):
        console.print(line, style="yellow")
    if checkpoint:
        checkpoints.check_same(checkpoint, "identity", trainer.run["identity"])
        for change in checkpoints.versions_changed(checkpoint):
            note = f"note: the checkpoint was written with {change[:400]}; results may differ in the last bits"
            console.print(note, style="yellow", markup=False, highlight=False)
        progress.restore(checkpoint.path)
        trainer.passed = progress.passed
        console.print(f"held-out loss before: {progress.evaluated[0]['eval_loss']:.3f}")
    elif distributed.process_count() > 1:
        trainer.args.eval_on_start = True  # a model that is evaluated before training would silently stay unwrapped
    else:
        trainer.evaluate()
    prompts = [row["input"] for row in task.questions(rows.heldout, recipe.samples)]
    if not distributed.from_first((folder / BEFORE).exists):
        texts = task.answers(model, tokenizer, prompts) if prompts else []
        if distributed.is_first():
            write_text(folder / BEFORE, json.dumps(texts))
    try:
        trainer.go_on(checkpoint)
    except KeyboardInterrupt:
        console.print(f"stopped at step {trainer.state.global_step}")
        raise
    finally:
        progress.bar.stop()
    trainer.check_finite()
    return Fitted(progress, parameters, base)


def measure(prepared: Prepared, trainer: Trainer, fitted: Fitted) -> Result:
    """Evaluate what `fit_steps` trained, and let it answer."""
    recipe, rows = prepared.recipe, prepared.rows
    model, console = cast(Any, trainer.model), prepared.console
    task, progress = TASKS[recipe.task], fitted.progress
    seconds = progress.seconds
    first, last = progress.evaluated[0], trainer.evaluate()
    before, after = first["eval_loss"], last["eval_loss"]
    console.print(f"held-out loss after:  {after:.3f}  ({duration(seconds)}, {gib(peak_memory())} peak)")
    then, now = task.scores(first), task.scores(last)
    for name, score in now.items():
        console.print(f"{name}: {then[name]:.3f} before, {score:.3f} after")
    answers = [distributed.from_first(lambda: json.loads(read_regular(prepared.folder / BEFORE)))]
    questions = task.questions(rows.heldout, recipe.samples)
    if questions:
        answers.append(task.answers(model, prepared.tokenizer, [row["input"] for row in questions]))
    scores = {name: (then[name], score) for name, score in now.items()}
    return Result(
        recipe, prepared.folder, fitted.parameters, fitted.base_parameters, before, after, seconds, progress.tokens,
        peak_memory(), progress.history, write_samples(questions, answers), scores,
        task.model_settings(rows).get("num_labels"),
    )  # fmt: skip


def predicted_memory(prepared: Prepared, trainer: Trainer) -> dict[str, float]:
    """Return the predicted bytes at the peak of a step, by part; nothing where the model cannot be simulated."""
    recipe = prepared.recipe
    if not find_model_class(recipe.task).planned:
        return {}
    try:
        run, length = planned_step(recipe, prepared.base, prepared.rows, dtype_for(recipe.dtype))
        need = run.step(trainer.args.per_device_train_batch_size, length)
    except ValueError:
        return {}
    parts = {
        "weights": need.frozen,
        "adapter, gradients, optimiser": need.trained + need.gradients + need.optimizer,
        "activations": need.activations,
    }
    return {**parts, "for a moment": max(0.0, need.peak - sum(parts.values()))}


def build_trainer(prepared: Prepared, base: Any) -> Trainer:
    """Return the trainer for a recipe, and adapt its base unless it is adapted already.

    Args:
        prepared: the run or trial; `batch_size: auto` is settled here.
        base: the model.
    """
    recipe, rows = prepared.recipe, prepared.rows
    tokenizer = prepared.tokenizer
    batch = recipe.batch_size
    if batch == "auto":
        most = largest_useful_batch(rows, distributed.process_count())
        step = planned_step(recipe, prepared.base, rows, base.dtype)
        batch = min(distributed.gather_values(fitting_batch(*step, most, loaded=True)))
    steps = optimizer_steps(recipe, len(rows.train), batch)
    stop: list[TrainerCallback] = [EarlyStoppingCallback(recipe.early_stopping)] if recipe.early_stopping else []
    adapter = None if isinstance(base, PeftModel) else recipe.adapter(steps)
    if adapter is not None:
        adapter.revision = recipe.revision  # of the base, for loading and merging
    task = TASKS[recipe.task]
    optimizer = own_optimizer(recipe.optim, recipe.rate, recipe.optimizer_args)
    train_dataset = training_set(rows, tokenizer) if rows.stream else task.dataset(rows.train, tokenizer, recipe)
    if recipe.group_by_length == "auto":
        recipe = replace(recipe, group_by_length=grouping_pays(prepared, cast(Dataset, train_dataset), batch))
    with shared_starts():
        trainer = task.trainer(
            base,
            args=training_arguments(recipe, prepared.folder, batch, steps, dtype_for(recipe.dtype)),
            train_dataset=train_dataset,
            eval_dataset=task.dataset(rows.heldout, tokenizer, recipe),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[Schedule(), *([Flat(recipe.flat_noise, recipe.seed)] if recipe.flat_noise else []), *stop],
            skips=recipe.skip_nan,
            ratios=role_ratios(recipe.lr_ratio, recipe.core_ratio),
            zeroth=recipe.zeroth(),
            **({} if optimizer is None else {"optimizer_cls_and_kwargs": optimizer}),
            **task.parts(tokenizer, rows, recipe),
        )
    if recipe.steps is None:
        settle_steps(recipe, trainer)
    if adapter is not None and not is_inlay(recipe.method):
        complete_peft_method(trainer)
    check_shapes(recipe.optim, cast(Any, trainer.model))
    raised([], cast(Any, trainer.model), trainer.ratios)  # refuses a model without pairs of what ratios are between
    return trainer


def grouping_pays(prepared: Prepared, examples: Dataset, batch: int) -> bool:
    """Return whether batches of similar length spare enough tokens, and print how many."""
    recipe = prepared.recipe
    if why_no_groups(recipe) is not None:
        return False
    lengths = [min(count, recipe.max_length) for count in token_counts(examples)]
    size = batch * recipe.accumulation * distributed.process_count()
    spared = tokens_spared(lengths, batch, size, recipe.seed) if lengths else 0.0
    if spared < PAYS:
        return False
    prepared.console.print(f"batches are of examples of similar length, which spares {spared:.0%} of the tokens")
    return True


def write_samples(questions: list[dict], answers: list[list[str]]) -> list[dict[str, str]]:
    """Combine prompts and references with the answers before and after training."""
    if len(answers) < 2:
        return []
    return [
        {"prompt": row["prompt"], "reference": row["reference"], "before": b, "after": a}
        for row, b, a in zip(questions, answers[0], answers[1], strict=False)
    ]
