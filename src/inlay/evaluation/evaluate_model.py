"""Evaluate a model, a run or an adapter on a task or by a metric, with or without its base: what `inlay eval` does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.evaluation.eval_tasks import EVAL_TASKS
from inlay.evaluation.metric import OnTask, Rows, load_metric, run_metric
from inlay.evaluation.run_settings import chat_settings
from inlay.evaluation.scores import Score, score_as_data, score_difference, unused_name, write_scores
from inlay.files.atomic import check_writable, find_again
from inlay.messages import dtype_name
from inlay.models.adapters import CONFIG, Adapter
from inlay.models.base import BaseModel
from inlay.models.loading import dtype_for


@dataclass(frozen=True)
class Evaluation:
    """Hold the scores of a model, and those of its base where these were requested.

    Attributes:
        file: where the scores are written; beside it, as .jsonl, every example's part in them.
        scores: of the model.
        rows: each example's prompt, answer and part in the scores.
        base: the scores of the base without the adapter.
        differences: by the name of a score, what the adapter changed, in words; none where that is not known.
    """

    file: Path
    scores: list[Score]
    rows: Rows
    base: list[Score] = field(default_factory=list)
    differences: dict[str, str] = field(default_factory=dict)

    def as_data(self) -> dict[str, object]:
        """Return the scores for JSON, without the examples, which are in the folder."""
        kinds = {"scores": self.scores, "base": self.base}
        told = {kind: [score_as_data(score) for score in scores] for kind, scores in kinds.items()}
        return {"folder": str(self.file.parent), "file": str(self.file), **told, "differences": self.differences}


def evaluate_model(
    model: str,
    *,
    task: str | None = None,
    metric: str | None = None,
    data: str | None = None,
    by: str = "generation",
    base: bool = False,
    merged: bool = False,
    scale: float = 1.0,
    limit: int | None = None,
    batch_size: int = 8,
    tokens: int | None = None,
    dtype: str = "auto",
    output: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
    done: Callable[[str], object] = lambda line: None,
) -> Evaluation:
    """Measure how well a model, a run or an adapter does a task, and write the scores to a folder.

    Args:
        model: hub id, folder, builtin, run folder or adapter folder.
        task: commonsense, gsm8k, exact, text, classification, reward, perplexity, or lm-eval:NAME.
        metric: in place of a task: module:function, (model, tokenizer) -> a number.
        data: a file or data set, as for training; tasks of lm-eval bring theirs.
        by: how options are chosen, "generation" or "likelihood".
        base: evaluate the base without the adapter too, and what the adapter changed.
        merged: merge the adapter into the base first.
        scale: the strength of the adapter (see `inlay.set_scale`).
        limit: take the first so many records.
        batch_size: questions at a time.
        tokens: the longest answer; None: the task's.
        dtype: of the base: auto, float32, bfloat16 or float16.
        output: the folder; None: eval/ in the run folder, else in the working folder.
        revision: of a hub model; None: the one an adapter was trained on.
        trust_remote_code: let the model's repository run its own code.
        console: where progress is shown; None: nowhere.
        done: called with each result, in words, as soon as it is known.

    Returns:
        The scores, which are in `output` as JSON too.

    Raises:
        ValueError: not exactly one of task and metric is given, the data or the model cannot be used, or `base`,
            `merged` or a `scale` is asked of what is no adapter.
    """
    if (task is None) == (metric is None):
        tasks = ", ".join(known.name for known in EVAL_TASKS)
        raise ValueError(f"--task or --metric says what is asked; give one of the two, as --task text (of {tasks})")
    if metric:
        run = load_metric(metric)
    else:
        given: dict[str, Any] = {"task": task, "data": data or "", "limit": limit, "by": by, "tokens": tokens}
        run = OnTask(**given, batch_size=batch_size).load(console, chat_settings(model))
    adapter = None
    if (find_again(Path(model)) / CONFIG).exists() or (Path(model) / "adapter").is_dir():
        adapter = Adapter.open(model, None, revision, trust_remote_code)
    if (base or merged or scale != 1) and adapter is None:
        raise ValueError(f"{model} is no adapter: --base, --merged and --scale are for one")
    if base and merged:
        raise ValueError("--merged leaves no base to compare with; leave out one of the two")
    folder = scores_folder(model, adapter, output)
    check_writable(folder)
    computed = dtype_for(dtype)
    if adapter is None:
        loaded, tokenizer = load_evaluated(BaseModel(model, revision, trust_remote_code), computed)
    else:
        loaded, tokenizer = adapter.load(computed, scale=scale)
    loaded = cast(Any, loaded).merge_and_unload() if merged else loaded
    about = {"model": model, "data": data, "by": by, "limit": limit, "tokens": tokens, "merged": merged, "scale": scale}
    about |= {"batch_size": batch_size, "revision": revision, "dtype": dtype_name(computed)}
    written = {"": {**about, "adapter": str(adapter.folder) if adapter else None}}
    if base:
        written["-base"] = {**about, "adapter": None}
    name = scores_name(metric or str(task), data, by, merged, scale)
    name = unused_name(folder, name, written)
    scores, rows = run_metric(run, loaded, tokenizer)
    file = write_scores(folder, name, scores, rows, written[""])
    for score in scores:
        done(str(score))
    if adapter is None or not base:
        return Evaluation(file, scores, rows)
    if adapter.may_modify_base:
        del loaded  # before its base is loaded a second time
        before, base_rows = run_metric(run, adapter.load_unadapted_base(computed), tokenizer)
    else:
        with cast(PeftModel, loaded).disable_adapter():
            before, base_rows = run_metric(run, loaded, tokenizer)
    write_scores(folder, f"{name}-base", before, base_rows, written["-base"])
    differences: dict[str, str] = {}
    for was, now in zip(before, scores, strict=True):
        done(f"base, {was}")
        if difference := score_difference(was, now, base_rows, rows):
            differences[now.name] = difference
            done(f"  the adapter, {now.name}: {difference}")
    return Evaluation(file, scores, rows, before, differences)


def load_evaluated(base: BaseModel, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model without an adapter, by the class that its configuration names, and its tokenizer."""
    tokenizer = base.tokenizer()
    return base.load(dtype, auto=base.evaluated_auto_class()), tokenizer


def scores_folder(model: str, adapter: Adapter | None, output: str | Path | None) -> Path:
    """Return the folder of the scores: the given one, or eval/ in a run's folder, or else in the working folder."""
    if output:
        return Path(output)
    where = Path(model)
    in_run = (adapter is not None and adapter.folder != where) or (where / "recipe.yaml").is_file()
    return (where if in_run else Path()) / "eval"


def scores_name(what: str, data: str | None, by: str, merged: bool, scale: float = 1.0) -> str:
    """Return the name of the files: the task or metric, the data, and what is not as usual."""
    file = Path(data or "")
    parts = (what, file.parent.name, file.stem, by if by == "likelihood" else "", "merged" if merged else "")
    parts += () if scale == 1 else (f"scale {scale:g}".replace("-", "minus "),)
    return "-".join(re.sub(r"\W+", "-", part).strip("-") for part in parts if part)
