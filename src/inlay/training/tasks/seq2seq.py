"""Encoder-decoder models that write a text from a text: summaries (XSum, CNN/DailyMail), translations, answers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from rich.console import Console
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, TrainingArguments

from inlay.data.chats import text_cell
from inlay.data.formats import FORMATS, SUMMARIES, Row, Rules, convert_all, question_of
from inlay.data.records import Record
from inlay.evaluation.generate import answer
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples, announce, measured
from inlay.training.mixture import train_and_heldout
from inlay.training.run_tokenizer import check_limits
from inlay.training.tasks.instruction import Settings, Task
from inlay.training.trainers.trainer import TargetTrainer

TAKEN = ("prompt", "input", "answer", "system")  # a source is one text: no earlier turns stand before it
SEQ2SEQ_FORMATS = {
    name: {role: columns for role, columns in roles.items() if role in TAKEN}
    for name, roles in {**SUMMARIES, **FORMATS}.items()
    if "prompt" in roles
}


class Seq2Seq(Task):
    """Train encoder-decoders: the source goes into the encoder, and the loss is over the target.

    The source is truncated at `max_length`. `system` is put before every source, as T5's "summarize: ".
    """

    trainer, arguments = TargetTrainer, TrainingArguments

    def examples(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
        train, held = train_and_heldout(recipe, seq2seq_examples, console, lambda row: row["source"])
        ids = [[tokenizer(row[side])["input_ids"] for side in ("source", "target")] for row in train]
        made = Examples(train, held, measured([max(map(len, sides)) for sides in ids], recipe))
        largest = max(max(side) for sides in ids for side in sides)
        check_limits(recipe, tokenizer, largest, min(made.audit.longest, recipe.max_length))
        announce(made, recipe, console)
        return made

    def settings(self, recipe: Recipe) -> Settings:
        return {
            "include_num_input_tokens_seen": "non_padding",
            "label_names": ["labels"],
            "prediction_loss_only": True,
        }

    def dataset(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
        limit = {"truncation": True, "max_length": recipe.max_length}
        sources = [tokenizer(row["source"], **limit) for row in rows]
        targets = [tokenizer(text_target=row["target"], **limit)["input_ids"] for row in rows]
        return Dataset.from_list([{**s, "labels": t} for s, t in zip(sources, targets, strict=True)])

    def batch(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, torch.Tensor]:
        """Return one batch of both sides; masks tell padding by lengths, which are therefore made to differ."""
        made = dict(DataCollatorForSeq2Seq(tokenizer)(list(self.dataset(rows, tokenizer, recipe))))
        if made["labels"].shape == made["input_ids"].shape:
            made["labels"] = F.pad(made["labels"], (0, 1), value=-100)
        return {**made, "decoder_attention_mask": (made["labels"] != -100).long()}

    def parts(self, tokenizer: PreTrainedTokenizerBase, rows: Examples, recipe: Recipe) -> Settings:
        return {"data_collator": DataCollatorForSeq2Seq(tokenizer)}

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return [{"input": r["source"], "prompt": r["source"], "reference": r["target"]} for r in rows[:count]]

    def answers(self, model: Any, tokenizer: PreTrainedTokenizerBase, inputs: list[Any]) -> list[str]:
        return answer(model, tokenizer, [[{"role": "user", "content": text}] for text in inputs])

    def shown(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
        return f"{row['source']} ⟦{row['target']}⟧"


def seq2seq_examples(records: list[Record], rules: Rules) -> list[Row]:
    """Return records as {"source", "target"}, with their system message, or the recipe's, before the source."""

    def row(record: Record, roles: dict[str, str]) -> list[Row]:
        cells = {role: record[column] for role, column in roles.items()}
        system = rules.system if cells.get("system") is None else text_cell(cells["system"], roles["system"])
        source = (system or "") + question_of(cells, roles)
        return [{"source": source, "target": text_cell(record[roles["answer"]], roles["answer"])}]

    return convert_all(records, rules, SEQ2SEQ_FORMATS, row)
