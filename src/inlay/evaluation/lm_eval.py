"""Tasks of lm-evaluation-harness (Gao et al., doi:10.5281/zenodo.10256836) through its Python API.

They are those that come with it, whose data a hub has, and YAML files of one's own, which work offline where their data
is local.

Prompts, few-shot examples and metrics are the task's; no chat template is applied, as the harness has it by default. A
YAML file may name Python functions beside it: their code is run, as with `--metric`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.files.untrusted import read_regular, regular_file, regular_files, user_path
from inlay.messages import first_line

PREFIX = "lm-eval:"
Results = dict[str, Any]


def load_lm_eval(name: str, limit: int | None, size: int) -> Callable[[Any, Any], Results]:
    """Load a task of the harness by name, that of a YAML file, or all of a folder; return what scores a model on it.

    The data is loaded at once.

    Raises:
        ValueError: lm-eval is not installed, or the task or its data cannot be loaded.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports] (as large as torchao, so not among what tests install)
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"task {PREFIX}{name} needs lm-eval ({error}); pip install 'inlay[harness]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = user_path(name)
    local = regular_files(regular_file(path)).exists()
    if not local and (path.suffix in (".yaml", ".yml") or len(path.parts) > 1):
        raise ValueError(f"task {PREFIX}{name}: there is no such file or folder")
    try:
        where = (str(path if path.is_dir() else path.parent),) if local else ()
        manager = TaskManager(include_path=list(where), include_defaults=not local)
        names = task_names(path, manager.all_tasks) if local else [name]
        manager.load(names)
    except Exception as error:  # the harness, datasets and the hub each raise their own kinds
        raise ValueError(f"task {PREFIX}{name} cannot be loaded: {first_line(error)}") from None

    def run(model: Any, tokenizer: PreTrainedTokenizerBase) -> Results:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own libraries
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
            results = lm_eval.simple_evaluate(wrapped, tasks=names, task_manager=manager, limit=limit)
        assert results is not None  # of processes, only the first gets results
        return dict(results)

    return run


def task_names(path: Path, tasks: list[str]) -> list[str]:
    """Return the tasks of a folder, or the one of a file."""
    if path.is_dir():
        return list(tasks)
    text = read_regular(path)  # which plain YAML does not read: it has tags of the harness's own
    for key in ("task", "group"):
        if match := re.search(rf"""^{key}:[ \t]*["']?([\w.-]+)""", text, re.MULTILINE):
            return [match[1]]
    raise ValueError("the file has no task: NAME")


def lm_eval_values(results: Results) -> Iterator[tuple[str, str, str, float, float | None, int | None]]:
    """Yield each score: task or group, metric, filter, value, standard error if there is one, number of examples."""
    for task, row in {**results["results"], **results.get("groups", {})}.items():
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{kind}")
            count = results.get("n-samples", {}).get(task, {}).get("effective")
            yield task, metric, kind, float(value), error if isinstance(error, int | float) else None, count


def lm_eval_title(task: str, metric: str, kind: str) -> str:
    """Return the name of a score."""
    return f"{task}, {metric}" + ("" if kind == "none" else f" ({kind})")


def lm_eval_examples(results: Results) -> list[dict[str, Any]]:
    """Return each example's prompt and answers, and its part in every score."""
    rows = []
    for task, samples in results.get("samples", {}).items():
        for sample in samples:
            kept = {key: sample[key] for key in ("doc_id", "doc", "target", "resps", "filtered_resps", "filter")}
            scores = {lm_eval_title(task, metric, sample["filter"]): sample[metric] for metric in sample["metrics"]}
            rows.append({"task": task, **kept, **scores})
    return rows
