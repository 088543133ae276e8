"""Run one trial of an experiment in a process of its own, so that its peak memory is its own.

It reads its folder's trial.json, and writes result.json last and in one step: a folder that has one is a finished run.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from inlay.data.formats import convert_records
from inlay.data.readers import read_records
from inlay.data.split import split_examples
from inlay.evaluation.ask_model import mean_token_loss
from inlay.evaluation.metric import Asked, metric_score, metric_title
from inlay.evaluation.run_settings import settings_of
from inlay.files.atomic import write_text
from inlay.files.untrusted import read_regular
from inlay.inspection.changes import changes, changes_as_data
from inlay.messages import Terminal, dtype_name, quiet, slug
from inlay.methods import import_methods
from inlay.models.loading import dtype_for
from inlay.models.model_classes import find_model_class
from inlay.recipe.recipe import Recipe
from inlay.recipe.rewards import import_reward
from inlay.reports.result import Result
from inlay.training.examples import Examples
from inlay.training.fit import fit, predicted_memory
from inlay.training.prepared import Prepared
from inlay.training.run_files import weights_of
from inlay.training.settle import settle
from inlay.training.tasks import TASKS
from inlay.training.trainers.trainer import Trainer

Places = Mapping[str, Sequence[Path]]  # where what was imported was found, by its name
TRIAL = "trial.json"
RESULT = "result.json"
LOG = "log.txt"
UNRELATED = Path(__file__).parent.parent / "resources" / "unrelated.txt"
TEXTS = 64  # most paragraphs of it that are read
SAMPLES = 3  # most held-out prompts that a method answers


@dataclass(frozen=True)
class Trial:
    """Describe the first `stop` steps of a recipe's run, and how it is evaluated.

    Attributes:
        method: its name in the experiment.
        recipe, stop: the run, and the steps of it that are trained.
        final: evaluate on the held-out examples, else on the `selection` examples that rates are chosen on.
        selection: how many of these are taken from the training examples.
        split_seed: draws both, alike for all trials of an experiment.
        unrelated: text on which forgetting is measured.
        label: the trial's folder, where rate and seed do not tell it from others.
        metric: measured beside the loss: a figure of the task's own (its first, if None), or see `load_metric`.
    """

    method: str
    recipe: Recipe
    stop: int
    final: bool
    selection: int
    split_seed: int
    unrelated: str | None = None
    label: str | None = None
    metric: Asked | None = None

    @property
    def name(self) -> str:
        """Return the name of the trial's folder."""
        if self.label:
            return self.label
        length = f"{self.stop}-of-{self.recipe.steps}" + ("-final" if self.final else "")
        return f"{slug(self.method)}/lr-{self.recipe.learning_rate}-seed-{self.recipe.seed}-{length}"

    @property
    def detailed(self) -> bool:
        """Return whether this is the one run of its method of which more than figures is kept."""
        return self.final and self.recipe.seed == self.split_seed

    def to_json(self) -> str:
        """Return the trial as JSON, for its folder."""
        return json.dumps(asdict(self))

    def result(self, folder: Path) -> dict[str, Any] | None:
        """Return the result in `folder` if this very trial finished there, else None."""
        file = folder / RESULT
        with suppress(TypeError):  # a trial of another version, with other fields
            if file.is_file() and read_trial(folder) == self:
                return json.loads(read_regular(file))
        return None


def read_trial(folder: Path) -> Trial:
    """Read the trial that a folder is for."""
    values = json.loads(read_regular(folder / TRIAL))
    return Trial(**{**values, "recipe": Recipe(**values["recipe"])})


class Prefix(TrainerCallback):
    """Stop the training after its first steps, with the schedules of the whole run."""

    def __init__(self, stop: int) -> None:
        self.stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        control.should_training_stop |= state.global_step >= self.stop


def trial_examples(trial: Trial, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
    """Return the examples to train on and to evaluate on, the same for every seed."""
    task = trial.recipe.task
    rows = TASKS[task].examples(replace(trial.recipe, seed=trial.split_seed), tokenizer, console)
    if rows.stream is not None:
        raise ValueError("streaming is for inlay train: trials draw their examples from the whole data set")
    key = None if task == "instruction" else lambda row: repr(next(iter(row.values())))  # its text, prompt or tokens
    rest, chosen = split_examples(rows.train, trial.selection, trial.split_seed, key)
    return replace(rows, train=rest, heldout=rows.heldout if trial.final else chosen)


def unrelated(source: str | None) -> list[str]:
    """Return paragraphs to measure forgetting on, from `source` or from those that Inlay includes.

    Raises:
        ValueError: the file cannot be read, or is not plain text.
    """
    rows = convert_records(read_records(source or str(UNRELATED)))
    if "text" not in rows[0]:
        raise ValueError(f"unrelated: {source} must be plain text: a .txt file, or records with a text column")
    return [row["text"] for row in rows[:TEXTS]]


def details(result: Result, trainer: Trainer, prepared: Prepared) -> dict[str, Any]:
    """Return what is kept of one run per method: its changes, its predicted memory, and its answers."""
    changed = changes(trainer.model, lambda: weights_of(result.recipe, prepared.base))
    planned = predicted_memory(prepared, trainer)
    return {"changes": changes_as_data(changed, spectra=True), "memory_planned": planned, "samples": result.samples}


def score_of(trial: Trial, run: Result, model: object, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return the score beside the loss and its name: the metric asked for, or else the task's first figure, if any."""
    own = {name: now for name, (_, now) in run.scores.items()}
    name = trial.metric or next(iter(own), None)
    if name is None:
        return {}
    if isinstance(name, str) and name in own:
        return {"metric": own[name], "metric_name": name}
    score = metric_score(name, model, tokenizer, settings_of(vars(trial.recipe)))
    return {"metric": score, "metric_name": metric_title(name)}


def finite_or_none(value: float) -> float | None:
    """Return a number for JSON; None for one that diverged."""
    return value if math.isfinite(value) else None


def run_trial(folder: Path) -> None:
    """Run the trial of a folder."""
    trial, console = read_trial(folder), Terminal(width=120)
    samples = min(SAMPLES, trial.recipe.samples) if trial.detailed else 0
    recipe = replace(trial.recipe, output=str(folder), samples=samples, save_every=0)
    tokenizer = TASKS[recipe.task].processor(recipe)
    rows, texts = trial_examples(trial, tokenizer, console), unrelated(trial.unrelated)
    dtype = dtype_for(recipe.dtype)
    prepared = Prepared(recipe, recipe.base_model, dtype, folder, tokenizer, rows, console)
    prepared, trainer = settle(prepared)
    trainer.add_callback(Prefix(trial.stop))
    recipe = prepared.recipe.resolved(dtype=dtype_name(dtype))
    prepared = replace(prepared, recipe=recipe)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    measure = (texts, trainer.model, tokenizer, recipe.max_length)
    forgets = find_model_class(recipe.task).causal  # other models have no loss over plain text
    unrelated_before = mean_token_loss(*measure) if forgets else 0.0
    run = fit(prepared, trainer)
    steps = [row for row in run.history if "loss" in row]
    scored = score_of(trial, run, trainer.model, tokenizer) if trial.final and math.isfinite(run.after) else {}
    result = {
        **scored,
        "before": run.before,
        "after": finite_or_none(run.after),
        "forgetting": finite_or_none(mean_token_loss(*measure) - unrelated_before) if forgets else None,
        "seconds": run.seconds,
        "seconds_per_step": (steps[-1]["seconds"] - steps[0]["seconds"]) / max(1, len(steps) - 1),
        "steps": trainer.state.global_step,
        "tokens": run.tokens,
        "memory": run.memory,
        "parameters": run.parameters,
        "parameters_last": steps[-1]["trained"],
        "base_parameters": run.base_parameters,
        **(details(run, trainer, prepared) if trial.detailed else {}),
        **({} if trial.final else {"rows": [row[:2] for row in trainer.row_sums]}),
        "curve": [(row["step"], finite_or_none(row["loss"])) for row in steps],
        "heldout": [(row["step"], finite_or_none(row["eval_loss"])) for row in run.history if "eval_loss" in row],
    }
    write_text(folder / RESULT, json.dumps(result))


def end_with_parent() -> None:
    """End this process at once when the one that started it is dead, which then may start the trial anew."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def trial_process(folder: Path, threads: int, modules: Places, rewards: Places) -> None:
    """Run a trial as the body of a process, with its output in the trial's log.

    Args:
        folder: of the trial.
        threads: that torch computes with.
        modules: of methods outside the package, to be imported as the process that starts this one did.
        rewards: functions that reward answers, likewise.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    torch.set_num_threads(threads)
    quiet()
    for module, folders in modules.items():
        import_methods(module, folders)
    for reward, folders in rewards.items():
        import_reward(reward, folders)
    run_trial(folder)
