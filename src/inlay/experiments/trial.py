"""One run of a comparison, in a process of its own so that its peak memory is its own.

It reads its folder's trial.json and writes result.json last and at once: a folder with one is a finished run.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from inlay.data.formats import convert_records
from inlay.data.readers import read_records
from inlay.data.split import split_examples
from inlay.evaluation.metric import Asked, metric_score
from inlay.files.atomic import write_text
from inlay.inspection.changes import changes, changes_as_data
from inlay.messages import quiet, slug
from inlay.models.loading import dtype_for
from inlay.recipe.recipe import Recipe
from inlay.reports.result import Result
from inlay.training.allocate_ranks import settle_ranks
from inlay.training.base_model import load_training_model
from inlay.training.calibration import calibration_batches, settle_calibration, start_from_data
from inlay.training.examples import Examples, load_examples
from inlay.training.fit import build_trainer, fit, predicted_memory
from inlay.training.run_files import weights_of
from inlay.training.run_tokenizer import run_tokenizer

TRIAL, RESULT, LOG = "trial.json", "result.json", "log.txt"
UNRELATED = Path(__file__).parent.parent / "resources" / "unrelated.txt"
TEXTS = 64  # paragraphs of it that are read, at most
SAMPLES = 3  # held-out prompts that a method answers, at most


@dataclass(frozen=True)
class Trial:
    """The first `stop` steps of a recipe's run, judged by the examples that rates are chosen on or, when it is final,
    by the held-out ones; `split_seed` draws both, for all trials of a comparison alike. `label` is its folder, where
    rate and seed do not tell it from others; `metric` what it is judged by beside its loss, see `load_metric`."""

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
        """The name of its folder."""
        if self.label:
            return self.label
        length = f"{self.stop}-of-{self.recipe.steps}" + ("-final" if self.final else "")
        return f"{slug(self.method)}/lr-{self.recipe.learning_rate}-seed-{self.recipe.seed}-{length}"

    @property
    def looked_into(self) -> bool:
        """Whether it is the one run of its method of which more is kept than numbers."""
        return self.final and self.recipe.seed == self.split_seed

    def to_json(self) -> str:
        """As it stands in its folder."""
        return json.dumps(asdict(self))

    def result(self, folder: Path) -> dict[str, Any] | None:
        """What it gave, if it is finished: what another trial left in the folder does not count."""
        found = folder / RESULT
        with suppress(TypeError):  # of another version, with other fields
            if found.is_file() and read_trial(folder) == self:
                return json.loads(found.read_text(encoding="utf-8"))
        return None


def read_trial(folder: Path) -> Trial:
    """The trial that a folder is for."""
    told = json.loads((folder / TRIAL).read_text(encoding="utf-8"))
    return Trial(**{**told, "recipe": Recipe(**told["recipe"])})


class Prefix(TrainerCallback):
    """Ends the training after some of its steps, its schedules being those of the whole; and with its parent, for
    nobody waits for the result any more."""

    def __init__(self, stop: int) -> None:
        self.stop, self.parent = stop, multiprocessing.parent_process()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.parent is not None and not self.parent.is_alive():
            raise SystemExit("the comparison has ended")
        control.should_training_stop |= state.global_step >= self.stop


def trial_examples(trial: Trial, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
    """Examples to train on and to judge by, the same for every seed."""
    rows = load_examples(replace(trial.recipe, seed=trial.split_seed), tokenizer, console)
    if rows.stream is not None:
        raise ValueError("streaming is for inlay train: a comparison draws its examples from all there are")
    rest, chosen = split_examples(rows.train, trial.selection, trial.split_seed)
    return Examples(rest, rows.heldout if trial.final else chosen, rows.audit)


@torch.no_grad()
def loss_on(texts: list[str], model: Any, tokenizer: PreTrainedTokenizerBase, length: int) -> float:
    """The mean loss, in nats per token, over all tokens of some texts but the first of each."""
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for text in texts:
        ids = torch.tensor([tokenizer(text=text)["input_ids"][:length]], device=model.device)
        logits = model(input_ids=ids).logits[0, -ids.shape[1] :]  # a prompt that was learned comes before them
        total += cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    model.train(was_training)
    return total / max(1, count)


def unrelated(source: str | None) -> list[str]:
    """Paragraphs to measure forgetting on.

    Raises:
        ValueError: the file cannot be read, or is no plain text.
    """
    rows = convert_records(read_records(source or str(UNRELATED)))
    if "text" not in rows[0]:
        raise ValueError(f"unrelated: {source} has to be plain text: a .txt file, or records with a text column")
    return [row["text"] for row in rows[:TEXTS]]


def look_into(found: Result, trainer: Any, rows: Examples) -> dict[str, Any]:
    """What is kept of one run of each method: what it changed, foresaw of its memory, and answers."""
    changed = changes(trainer.model, lambda: weights_of(found.recipe))
    planned = predicted_memory(found.recipe, rows, trainer)
    return {"changes": changes_as_data(changed, spectra=True), "memory_planned": planned, "samples": found.samples}


def finite_or_none(value: float) -> float | None:
    """A number as JSON has it; none for what diverged."""
    return value if math.isfinite(value) else None


def run_trial(folder: Path) -> None:
    """Carry out the trial of a folder."""
    trial, console = read_trial(folder), Console(width=120)
    samples = min(SAMPLES, trial.recipe.samples) if trial.looked_into else 0
    recipe = replace(trial.recipe, output=str(folder), samples=samples, save_every=0)
    tokenizer = run_tokenizer(recipe)
    rows, texts = trial_examples(trial, tokenizer, console), unrelated(trial.unrelated)
    set_seed(recipe.seed)
    recipe, dtype = settle_ranks(recipe, console), dtype_for(recipe.dtype)
    recipe = settle_calibration(recipe, dtype, folder, tokenizer, rows, console)
    seen = calibration_batches(recipe, tokenizer, rows)
    trainer = build_trainer(
        recipe, load_training_model(recipe, dtype, folder, console, batches=seen), tokenizer, rows, folder
    )
    start_from_data(recipe, trainer.model, tokenizer, rows, console)
    trainer.add_callback(Prefix(trial.stop))
    recipe = recipe.resolved(dtype=str(dtype).removeprefix("torch."))
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    measure = (texts, trainer.model, tokenizer, recipe.max_length)
    knew = loss_on(*measure) if trial.final else 0.0
    found = fit(recipe, trainer, tokenizer, rows, console)
    steps = [row for row in found.history if "loss" in row]
    judged = trial.metric if math.isfinite(found.after) else None
    scored = {} if judged is None else {"metric": metric_score(judged, trainer.model, tokenizer)}
    result = {
        **scored,
        "before": found.before,
        "after": finite_or_none(found.after),
        "forgetting": finite_or_none(loss_on(*measure) - knew) if trial.final else None,
        "seconds": found.seconds,
        "seconds_per_step": (steps[-1]["seconds"] - steps[0]["seconds"]) / max(1, len(steps) - 1),
        "steps": trainer.state.global_step,
        "tokens": found.tokens,
        "memory": found.memory,
        "parameters": found.parameters,
        "parameters_last": steps[-1]["trained"],
        "base_parameters": found.base_parameters,
        **(look_into(found, trainer, rows) if trial.looked_into else {}),
        "curve": [(row["step"], finite_or_none(row["loss"])) for row in steps],
        "heldout": [(row["step"], finite_or_none(row["eval_loss"])) for row in found.history if "eval_loss" in row],
    }
    write_text(folder / RESULT, json.dumps(result))


def trial_process(folder: Path, threads: int) -> None:
    """The process of a trial; what it says goes into its log."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    torch.set_num_threads(threads)
    quiet()
    run_trial(folder)
