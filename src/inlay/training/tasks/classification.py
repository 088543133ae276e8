"""Sequence classification, in the form of GLUE: a sentence or a pair, and a label; or a score (STS-B)."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from scipy import stats
from transformers import DataCollatorWithPadding, TrainingArguments

from inlay.workbench import data, prepare
from inlay.workbench.prepare import Examples
from inlay.workbench.read import Record
from inlay.workbench.recipe import Recipe
from inlay.workbench.tasks.task import Row, Task
from inlay.workbench.trainer import PlainTrainer

FORMATS = {
    "pair": {
        "text": ("sentence1", "premise", "question1", "question"),
        "pair": ("sentence2", "hypothesis", "question2", "sentence"),
        "label": ("label",),
    },
    "sentence": {"text": ("sentence", "text"), "label": ("label",)},
}


class Classification(Task):
    """Encoders and decoders with a new head of one output a label, which is trained whole; cross-entropy, or squared
    error where the labels are numbers with fractions."""

    trainer, arguments = PlainTrainer, TrainingArguments
    metrics = ("accuracy", "f1", "matthews", "pearson", "spearman")

    def examples(self, recipe: Recipe, tokenizer: Any, console: Console) -> Examples:
        """As of any task; a label is what stands in its column, and labels are ordered by value."""
        train, held = prepare.halves(recipe, lambda records: convert(records, recipe.columns), lambda row: row["text"])
        values = {row["label"] for row in (*train, *held)}
        labels = order(values)
        if len(values) < 2:
            raise ValueError(f"label: every example has {values.pop()!r}; there have to be two labels at least")
        for row in (*train, *held):
            row["labels"] = labels.index(row["label"]) if labels else float(row["label"])
        made = Examples(train, held, prepare.measured([encoded(row, tokenizer) for row in train], recipe), labels)
        prepare.announce(made, recipe, console)
        return made

    def model_settings(self, rows: Examples) -> dict[str, Any]:
        names = rows.labels or ["score"]
        kind = "single_label_classification" if rows.labels else "regression"
        ids = {name: i for i, name in enumerate(names)}
        return {
            "num_labels": len(names),
            "id2label": {i: name for name, i in ids.items()},
            "label2id": ids,
            "problem_type": kind,
        }

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"include_num_input_tokens_seen": "non_padding", "label_names": ["labels"]}

    def dataset(self, rows: list[Row], tokenizer: Any, recipe: Recipe) -> Dataset:
        cut = [tokenizer(row["text"], row["pair"], truncation=True, max_length=recipe.max_length) for row in rows]
        return Dataset.from_list([{**one, "labels": row["labels"]} for one, row in zip(cut, rows, strict=True)])

    def batch(self, rows: list[Row], tokenizer: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
        return dict(DataCollatorWithPadding(tokenizer)(cast(Any, list(self.dataset(rows, tokenizer, recipe)))))

    def parts(self, tokenizer: Any, rows: Examples) -> dict[str, Any]:
        made = classified if rows.labels else correlated
        return {
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": lambda found: made(np.asarray(found.predictions), np.asarray(found.label_ids)),
        }

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return [
            {"input": [r["text"], r["pair"]], "prompt": joined(r), "reference": str(r["label"])} for r in rows[:count]
        ]

    @torch.no_grad()
    def answers(self, model: Any, tokenizer: Any, inputs: list[Any]) -> list[str]:
        was_training, said = model.training, []
        model.eval()
        for text, pair in inputs:
            logits = model(**tokenizer(text, pair, truncation=True, return_tensors="pt").to(model.device)).logits[0]
            score = f"{logits.item():.2f}" if len(logits) == 1 else model.config.id2label[int(logits.argmax())]
            said.append(str(score))
        model.train(was_training)
        return said

    def shown(self, row: Row, tokenizer: Any, recipe: Recipe) -> str:
        return f"{joined(row)} ⟦{row['label']}⟧"


def convert(records: list[Record], columns: dict[str, str]) -> list[Row]:
    """Records as {"text", "pair" (or None), "label"}; a label as the text of it."""

    def row(record: Record, roles: dict[str, str]) -> list[Row]:
        label = record[roles["label"]]
        if label is None or not str(label).strip() or isinstance(label, (list, dict)):
            raise ValueError(f"{roles['label']} is {data.short(label)}; accepted: a label")
        pair = data.string(record[roles["pair"]], roles["pair"]) if "pair" in roles else None
        text = data.string(record[roles["text"]], roles["text"])
        return [{"text": text, "pair": pair, "label": str(label).strip()}]

    return data.convert_all(records, columns, FORMATS, row)


def order(values: set[str]) -> list[str] | None:
    """Labels by value: as whole numbers where all are, else as text; None where they are numbers with fractions."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        return sorted(values)
    return sorted(values, key=lambda v: numbers[v]) if all(n.is_integer() for n in numbers.values()) else None


def encoded(row: Row, tokenizer: Any) -> int:
    """An example's length in tokens."""
    return len(tokenizer(row["text"], row["pair"])["input_ids"])


def joined(row: Row) -> str:
    """Both texts of a pair."""
    return row["text"] if row["pair"] is None else f"{row['text']} | {row['pair']}"


def classified(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy; F1 of the second of two labels (as GLUE has it), of more the mean over them; Matthews' correlation, of
    more than two labels Gorodkin's R_k (2004)."""
    size, found = logits.shape[1], logits.argmax(1)
    table = np.zeros((size, size))  # true label × predicted label
    np.add.at(table, (labels, found), 1)
    right, true, said, total = table.diagonal(), table.sum(1), table.sum(0), len(labels)
    f1 = 2 * right / np.maximum(true + said, 1)
    spread = np.sqrt(total**2 - (true @ true)) * np.sqrt(total**2 - (said @ said))
    matthews = (right.sum() * total - true @ said) / spread if spread else 0.0
    return {
        "accuracy": float(right.sum() / total),
        "f1": float(f1[1] if size == 2 else f1.mean()),
        "matthews": float(matthews),
    }


def correlated(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where one side does not vary."""
    scores = scores.reshape(-1)
    if np.ptp(scores) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    made: list[Any] = [stats.pearsonr(scores, labels), stats.spearmanr(scores, labels)]
    return {"pearson": float(made[0].statistic), "spearman": float(made[1].statistic)}
