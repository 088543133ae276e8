"""Sequence classification, in the form of GLUE: a sentence or a pair, and a label; or a score (STS-B)."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, TrainingArguments

from inlay.data.formats import Row
from inlay.data.labelled import alike, labelled_examples, one_label
from inlay.evaluation.label_metrics import classified, correlated
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples, announce, measured
from inlay.training.mixture import say, train_and_heldout
from inlay.training.run_tokenizer import check_limits, padding_tokenizer
from inlay.training.tasks.instruction import Settings, Task
from inlay.training.trainers.trainer import PlainTrainer


class Classification(Task):
    """Train encoders and decoders with a new head of one output per label, which is trained whole.

    The loss is cross-entropy, or squared error where the labels are numbers with fractions.
    """

    trainer, arguments = PlainTrainer, TrainingArguments
    metrics = ("accuracy", "f1", "matthews", "pearson", "spearman")

    def processor(self, recipe: Recipe) -> Any:
        """Return a tokenizer that pads."""
        return padding_tokenizer(recipe)

    def examples(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
        """Return examples as any task does; a label is what stands in its column, and labels are ordered by value."""
        train, held = train_and_heldout(recipe, labelled_examples, console, lambda row: row["text"])
        known = {row["label"] for row in (*train, *held)}
        for row in (*train, *held):
            row["label"] = one_label(row["label"], known)
        values = {row["label"] for row in (*train, *held)}
        labels = ordered_labels(values)
        say(label_notes(train, held, labels), console)
        if len(values) < 2:
            raise ValueError(f"label: every example has {values.pop()!r}; there have to be two labels at least")
        for row in (*train, *held):
            row["labels"] = labels.index(row["label"]) if labels else float(row["label"])
        ids = [tokenizer(row["text"], row["pair"])["input_ids"] for row in train]
        audit = measured(list(map(len, ids)), recipe)
        check_limits(recipe, tokenizer, max(map(max, ids)), min(audit.longest, recipe.max_length))
        made = Examples(train, held, audit, labels, padding=cast("int", tokenizer.pad_token_id))
        announce(made, recipe, console)
        return made

    def model_settings(self, rows: Examples) -> Settings:
        names = rows.labels or ["score"]
        kind = "single_label_classification" if rows.labels else "regression"
        ids = {name: i for i, name in enumerate(names)}
        return {
            "num_labels": len(names),
            "id2label": {i: name for name, i in ids.items()},
            "label2id": ids,
            "problem_type": kind,
            "pad_token_id": rows.padding,  # by which a decoder finds the last token of each text
        }

    def settings(self, recipe: Recipe) -> Settings:
        return {"include_num_input_tokens_seen": "non_padding", "label_names": ["labels"]}

    def dataset(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
        cut = [tokenizer(row["text"], row["pair"], truncation=True, max_length=recipe.max_length) for row in rows]
        return Dataset.from_list([{**one, "labels": row["labels"]} for one, row in zip(cut, rows, strict=True)])

    def batch(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, torch.Tensor]:
        return dict(DataCollatorWithPadding(tokenizer)(cast(Any, list(self.dataset(rows, tokenizer, recipe)))))

    def parts(self, tokenizer: PreTrainedTokenizerBase, rows: Examples, recipe: Recipe) -> Settings:
        made = classified if rows.labels else correlated
        return {
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": lambda found: made(np.asarray(found.predictions), np.asarray(found.label_ids)),
        }

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return [
            {"input": [r["text"], r["pair"]], "prompt": joined_texts(r), "reference": str(r["label"])}
            for r in rows[:count]
        ]

    @torch.no_grad()
    def answers(self, model: Any, tokenizer: PreTrainedTokenizerBase, inputs: list[Any]) -> list[str]:
        was_training, said = model.training, []
        model.eval()
        for text, pair in inputs:
            logits = model(**tokenizer(text, pair, truncation=True, return_tensors="pt").to(model.device)).logits[0]
            score = f"{logits.item():.2f}" if len(logits) == 1 else model.config.id2label[int(logits.argmax())]
            said.append(str(score))
        model.train(was_training)
        return said

    def shown(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
        return f"{joined_texts(row)} ⟦{row['label']}⟧"


def label_notes(train: list[Row], held: list[Row], labels: list[str] | None) -> list[str]:
    """Return what a person should know of the labels: those never learned, and those that may be meant as one."""
    learned = {row["label"] for row in train}
    unseen = sorted({row["label"] for row in held} - learned) if labels else []
    notes = [f"only held-out rows have the label {', '.join(unseen[:10])}: it is not learned"] if unseen else []
    if labels is None:
        scores = [float(label) for label in learned]
        notes.append(f"labels are scores from {min(scores):g} to {max(scores):g}, as some have fractions: a regression")
    return notes + [
        f"the labels {group} differ in capitals alone; they are classes of their own" for group in alike(labels or ())
    ]


def ordered_labels(values: set[str]) -> list[str] | None:
    """Return labels by value: as whole numbers where all are, else as text; None if they are fractional numbers."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        return sorted(values)
    return sorted(values, key=lambda v: numbers[v]) if all(n.is_integer() for n in numbers.values()) else None


def joined_texts(row: Row) -> str:
    """Return both texts of a pair."""
    return row["text"] if row["pair"] is None else f"{row['text']} | {row['pair']}"
