"""A run's examples: read, split, audited, and announced."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset, IterableDataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from inlay.data.audit import Audit, audit_examples
from inlay.data.chats import Example
from inlay.data.formats import convert_records
from inlay.data.render import answer_weights, render, sequences
from inlay.data.streaming import EXAMPLE_COLUMNS
from inlay.recipe.recipe import Recipe
from inlay.training.mixture import streamed, train_and_heldout
from inlay.training.run_tokenizer import answer_ends, check_limits
from inlay.training.trainers.token_weights import WEIGHTS

TOKENS = "\nfirst example, the tokens that are learned from in ⟦⟧:"


@dataclass
class Examples:
    """Hold training and held-out examples, and what was found about them.

    Of a `stream`, `train` is the beginning, and `shards` are its files with their sizes and digests.
    """

    train: list[dict]
    heldout: list[dict]
    audit: Audit
    labels: list[str] | None = None  # of a classification
    padding: int | None = None  # and the token that fills up its texts
    stream: IterableDataset | None = None
    shards: tuple[tuple[str, int, str], ...] = ()
    conversations: int | None = None  # held out, before those that are learned turn by turn were taken apart
    weighted: bool = False  # a stream in which some answers have a weight other than 0 and 1

    @property
    def eval_size(self) -> int:
        """Return how many examples were held out: what a recipe says to hold out the same again."""
        return len(self.heldout) if self.conversations is None else self.conversations


def load_examples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
    """Read, split and audit a recipe's data; what cannot be learned from is counted and said."""
    source = None
    if recipe.streaming:
        train, held, source = streamed(recipe, console)
    else:
        train, held = train_and_heldout(recipe, lambda records, rules: convert_records(records, rules=rules), console)
    audit = audit_examples(train, tokenizer, recipe.max_length, answer_ends(recipe))
    held_audit = audit_examples(held, tokenizer, recipe.max_length)
    count = f"{len(train)} examples to train on"
    if source is not None:
        count = (
            f"a stream of {source.count} examples, of which the first {len(train)} are seen through the chat template "
            "and the tokenizer before training"
        )
    console.print(f"{count}, {len(held)} held out; longest {audit.longest} tokens")
    if audit.cut or audit.masked:
        console.print(
            f"{audit.cut} answers are cut off at max_length={recipe.max_length}, "
            f"{audit.masked} of them wholly (those are left out); raise --max-length to keep them",
            style="yellow",
        )
    if audit.shifted:
        console.print(
            f"in {audit.shifted} examples the prompt's last tokens merge with the answer's first; end prompts "
            "on a word or a line to have the model answer from what it was trained on",
            style="yellow",
        )
    for note in audit.notes:
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if audit.masked == audit.answers:
        raise ValueError(f"no example keeps an answer within max_length={recipe.max_length}; raise it")
    if held_audit.masked == held_audit.answers:
        raise ValueError(f"no held-out example keeps an answer within max_length={recipe.max_length}; raise it")
    longest = max(audit.longest, held_audit.longest)
    length = recipe.max_length if source else min(longest, recipe.max_length)
    check_limits(recipe, tokenizer, max(audit.largest_token, held_audit.largest_token), length)
    made = Examples(audit.sequences, held_audit.sequences, audit, conversations=len(held))
    weighted = is_weighted(audit.sequences) if source is None else source.weighted
    if weighted:
        check_weights(recipe)
    if source is None:
        return made
    return replace(made, stream=source.examples, shards=source.shards, weighted=weighted)


def is_weighted(rows: list[Example]) -> bool:
    """Return whether some learned answers have a weight other than 1."""
    return any(weight != 1 for row in rows for weight in answer_weights(row))


def check_weights(recipe: Recipe) -> None:
    """Refuse what does not go with weights of answers other than 0 and 1.

    Raises:
        ValueError: the recipe says such a thing.
    """
    keys = ("label_smoothing_factor", "loss_type", "torch_compile", "use_liger_kernel")
    odd = [f"trainer: {key}" for key in keys if recipe.trainer.get(key)]
    odd += ["packing"] if recipe.packing else []
    odd += [f"step: {recipe.step}"] if recipe.step != "backward" else []
    if odd:
        raise ValueError(
            f"weights of answers other than 0 and 1 do not go with {odd[0]}; leave it out, or --ignore weight counts "
            "all answers alike"
        )


def measured(lengths: list[int], recipe: Recipe) -> Audit:
    """Return an audit of examples that are cut without losing their answer."""
    cut = sum(n > recipe.max_length for n in lengths)
    return Audit(len(lengths), cut, 0, 0, max(lengths), sum(lengths) / len(lengths), 0)


def announce(rows: Examples, recipe: Recipe, console: Console) -> None:
    """Say how many examples there are, and how many are cut."""
    console.print(
        f"{len(rows.train)} examples to train on, {len(rows.heldout)} held out; longest {rows.audit.longest} tokens"
        + (f"; labels: {', '.join(rows.labels[:20])}" if rows.labels else "")
    )
    if rows.audit.cut:
        console.print(f"{rows.audit.cut} examples are cut at max_length={recipe.max_length}", style="yellow")


def token_dataset(rows: list[Example], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return examples as trl takes them: tokens, and as labels those that are learned. trl cuts or packs them."""
    shown = (render(row, tokenizer, None) for row in rows)
    columns: dict[str, list] = {"input_ids": [], "labels": []}
    weighted = is_weighted(rows)
    for one in shown:
        columns["input_ids"].append(np.array(one.ids, np.int32))
        columns["labels"].append(np.array(one.labels, np.int32))
        if weighted:
            columns.setdefault(WEIGHTS, []).append(np.array(one.token_weights, np.float32))
    return Dataset.from_dict(columns)


def training_set(rows: Examples, tokenizer: PreTrainedTokenizerBase) -> Dataset | IterableDataset:
    """Return what a run trains on, as trl takes it."""
    if rows.stream is None:
        return token_dataset(rows.train, tokenizer)

    def tokens(batch: dict[str, list]) -> dict[str, list]:
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        whole = [{key: value for key, value in one.items() if value is not None} for one in examples]
        parts = [render(part, tokenizer, None) for one in whole for part in sequences(one, tokenizer)]
        made: dict[str, list] = {"input_ids": [part.ids for part in parts], "labels": [part.labels for part in parts]}
        return made | ({WEIGHTS: [part.token_weights for part in parts]} if rows.weighted else {})

    return rows.stream.map(tokens, batched=True, batch_size=100, remove_columns=list(EXAMPLE_COLUMNS))
