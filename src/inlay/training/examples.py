"""A run's examples: read, split, audited, and announced."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset, IterableDataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from inlay.data.formats import convert_records
from inlay.data.render import Audit, as_plain_text, audit_examples, render
from inlay.recipe.recipe import Recipe
from inlay.training.mixture import streamed, train_and_heldout

TOKENS = "\nfirst example, the tokens that are learned from in ⟦⟧:"


@dataclass
class Examples:
    """Training and held-out examples, and what was found about them. Of a `stream`, `train` is the beginning, and
    `shards` its files with their sizes and digests."""

    train: list[dict]
    heldout: list[dict]
    audit: Audit
    labels: list[str] | None = None  # of a classification
    stream: IterableDataset | None = None
    shards: tuple[tuple[str, int, str], ...] = ()


def load_examples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
    """Read, split and audit a recipe's data; what cannot be learned from is counted and said."""
    source = None
    if recipe.streaming:
        train, held, source = streamed(recipe, console)
    else:
        train, held = train_and_heldout(recipe, lambda records, rules: convert_records(records, rules=rules), console)
    audit = audit_examples(train, tokenizer, recipe.max_length)
    count = str(len(train)) if source is None else f"a stream of {source.count}, looked at {len(train)}:"
    console.print(f"{count} examples to train on, {len(held)} held out; longest {audit.longest} tokens")
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
    if audit.masked == audit.total:
        raise ValueError(f"no example keeps an answer within max_length={recipe.max_length}; raise it")
    if not any(render(row, tokenizer, recipe.max_length).answer_ids for row in held):
        raise ValueError(f"no held-out example keeps an answer within max_length={recipe.max_length}; raise it")
    if source is None:
        return Examples(train, held, audit)
    return Examples(train, held, audit, stream=source.examples, shards=source.shards)


def measured(lengths: list[int], recipe: Recipe) -> Audit:
    """An audit of examples that are cut without losing their answer."""
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


def as_dataset(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Examples as trl takes them: conversations where the tokenizer has a chat template, else plain text."""
    return Dataset.from_list(rows if tokenizer.chat_template else [as_plain_text(row) for row in rows])


def training_set(rows: Examples, tokenizer: PreTrainedTokenizerBase) -> Dataset | IterableDataset:
    """What a run trains on, as trl takes it."""
    if rows.stream is None:
        return as_dataset(rows.train, tokenizer)
    if tokenizer.chat_template:
        return rows.stream
    return rows.stream.map(as_plain_text)
