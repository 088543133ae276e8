"""The metric by which a model is evaluated beside its loss.

It is a task of `inlay eval`, one of lm-evaluation-harness, or a user's own function; `inlay eval`, `inlay compare` and
`inlay tune` all take it in the same form.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from inlay.data.readers import read_records
from inlay.evaluation.eval_tasks import find_eval_task, questions_for
from inlay.evaluation.evaluate import evaluate
from inlay.evaluation.lm_eval import PREFIX, Results, lm_eval_examples, lm_eval_title, lm_eval_values, load_lm_eval
from inlay.evaluation.run_settings import ChatSettings
from inlay.evaluation.scores import Score
from inlay.evaluation.text_overlap import MEASURES
from inlay.messages import check_installed, did_you_mean
from inlay.recipe.schema import conform_all, field_of

Asked = str | dict[str, Any]  # as a recipe asks for one
Rows = list[dict[str, Any]]
Run = Callable[[Any, Any], tuple[list[Score], Rows]]  # of (model, tokenizer): figures, and each example's part in them

METRIC_HELP = (
    "{task: commonsense, data: test.json, limit: 100, by: likelihood}, a task of inlay eval with its flags (and "
    "figure, of several the one), or module:function, (model, tokenizer) -> a number"
)


@dataclass
class OnTask:
    """Name a task of `inlay eval`; the fields are the flags there."""

    task: str = field_of("", "the task, or lm-eval:NAME")
    data: str = field_of("", "a file or data set, as for train; none for lm-eval:")
    limit: int | None = field_of(None, "the first so many records", min=1)
    by: Literal["generation", "likelihood"] = field_of("generation", "how options are chosen")
    tokens: int | None = field_of(None, "longest answer (default: the task's)", min=1)
    batch_size: int = field_of(8, "questions at a time", min=1)
    figure: str = field_of("", "of a task with several figures, which (default: the first)")

    def __post_init__(self) -> None:
        conform_all(self)
        if self.is_lm_eval:
            if self.data:
                raise ValueError(f"task {self.task} brings its own data; leave out data {self.data}")
            return
        figures = find_eval_task(self.task).figures
        if self.figure and self.figure not in figures:
            raise ValueError(f"figure {self.figure!r} of task {self.task} is not one of {', '.join(figures)}")
        if not self.data:
            raise ValueError(f"task {self.task} has no data: give it a file or a data set")

    @property
    def is_lm_eval(self) -> bool:
        """Return whether the task is one of lm-evaluation-harness."""
        return self.task.startswith(PREFIX)

    @property
    def title(self) -> str:
        """Return the name of the task's score in a table."""
        return self.figure or (self.task if self.is_lm_eval else find_eval_task(self.task).figures[0])

    def load(self, console: Console | None = None, settings: ChatSettings | None = None) -> Run:
        """Read the data, check its form, and return the function that measures a model.

        Raises:
            ValueError: the data cannot be read, is not of the task's form, or a library is missing.
        """
        if self.is_lm_eval:
            measure = load_lm_eval(self.task.removeprefix(PREFIX), self.limit, self.batch_size)
            return lambda model, tokenizer: lm_eval_scores(measure(model, tokenizer))
        task = find_eval_task(self.task)
        if task.name == "text":
            check_installed("task text", "sacrebleu")
            if self.figure:
                check_installed(self.figure, MEASURES[self.figure][0])
        records = read_records(self.data, one_split=True)[: self.limit]
        questions_for(task, records, self.by)
        return lambda model, tokenizer: evaluate(
            model, tokenizer, task, records, self.by, self.batch_size, self.tokens, console, settings
        )


def lm_eval_scores(results: Results) -> tuple[list[Score], Rows]:
    """Return the scores of lm-evaluation-harness, with intervals of 1.96 of its standard errors to either side."""
    figures = []
    for task, name, kind, value, error, count in lm_eval_values(results):
        low, high = (value - 1.96 * error, value + 1.96 * error) if error else (None, None)
        figures.append(Score(lm_eval_title(task, name, kind), value, low, high, count))
    return figures, lm_eval_examples(results)


def on_task(given: dict[str, Any]) -> OnTask:
    """Return the task that a recipe's mapping describes.

    Raises:
        ValueError: there is no such task or figure, or a key is not known, missing or of another type.
    """
    names = [f.name for f in fields(OnTask)]
    for key in given:
        if key not in names:
            raise ValueError(f"metric has no {key!r}; {did_you_mean(key, names)}")
    try:
        return OnTask(**given)
    except ValueError as error:
        raise ValueError(f"metric: {error}") from None


def metric_title(given: Asked) -> str:
    """Return the name of a metric in a table."""
    return given if isinstance(given, str) else on_task(given).title


def less_is_better(given: Asked) -> bool:
    """Return whether less of a metric is better, which is known of Inlay's own tasks alone."""
    if isinstance(given, str):
        return False
    metric = on_task(given)
    return not metric.is_lm_eval and find_eval_task(metric.task).less


def load_metric(given: Asked, settings: ChatSettings | None = None) -> Run:
    """Load a metric. A user's own code, in a module of the working folder or an installed one, is imported and run.

    Raises:
        ValueError: there is no such task, data or function, or the data is not of the task's form.
    """
    if not isinstance(given, str):
        metric = on_task(given)
        try:
            return metric.load(settings=settings)
        except ValueError as error:
            raise ValueError(f"metric: {error}") from None
    module, _, function = given.partition(":")
    if not module or not function:
        raise ValueError(
            f"metric: {given!r} is not written as module:function, as in my_metric:exact_match, nor as a task, "
            "{task: commonsense, data: test.json}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        measure: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of the user's fails in its own ways
        raise ValueError(f"metric: {given} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(measure):
        raise ValueError(f"metric: {given} is no function of (model, tokenizer)")

    def run(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Score], Rows]:
        value: Any = measure(model, tokenizer)
        if not isinstance(value, int | float):
            raise ValueError(f"metric: {given} gave {value!r}, which is no number")
        return [Score(given, float(value))], []

    return run


def run_metric(metric: Run, model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Score], Rows]:
    """Measure a model by a metric, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        return metric(model, tokenizer)
    finally:
        model.train(was_training)


def metric_score(
    given: Asked, model: Any, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings | None = None
) -> float:
    """Return the one score that a metric stands for, of a model that was trained with such settings.

    Raises:
        ValueError: it cannot be loaded, does not say this figure, or gives no finite number.
    """
    figures, _ = run_metric(load_metric(given, settings), model, tokenizer)
    values = {figure.name: figure.value for figure in figures}
    name = metric_title(given) if isinstance(given, str) or given.get("figure") else figures[0].name
    if name not in values:
        raise ValueError(f"metric: the task gives {', '.join(values)}, and not {name}")
    if not math.isfinite(values[name]):
        raise ValueError(f"metric: {name} is {values[name]}, which is no finite number")
    return values[name]
