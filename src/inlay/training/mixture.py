"""A run's sources made one set of examples: converted, some held out, and each as often as its weight says."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from inlay.data.folders import folder_parts
from inlay.data.formats import Findings, Rules, convert_records, example_key
from inlay.data.readers import KINDS, Reading, read_files, read_records, read_splits
from inlay.data.records import Record
from inlay.data.split import split_examples
from inlay.data.streaming import Stream, first_examples, mix_streams, open_stream, taken
from inlay.files.untrusted import user_path
from inlay.recipe.recipe import Recipe
from inlay.recipe.sources import Source, sources

LOOKED_AT = 1000  # examples of a stream that are audited
Convert = Callable[[list[Record], Rules], list[dict]]


def streamed(recipe: Recipe, console: Console) -> tuple[list[dict], list[dict], Stream]:
    """Return the examples of a stream that are looked at, the held-out ones, and the stream to train on."""
    given, reading = sources(recipe), reading_of(recipe)
    found = Findings()
    size, alone = int(recipe.eval_size or 100), len(given) == 1 and given[0].weight == 1
    held = own_heldout(recipe, given, reading, found)
    if not held and not alone:
        raise ValueError(
            "data: a mixture of streams holds nothing out itself; give eval_data, or folders with both splits"
        )
    streams = [open_stream(one.path, rules_of(recipe, one, found), reading, held, size) for one in given]
    stream = streams[0] if alone else mix_streams(streams, [one.weight for one in given])
    train = first_examples(stream.examples, LOOKED_AT)
    said = [*dict.fromkeys(reading.notes), *found.lines(), *overlap(stream.repeated, len(held) or size)]
    check_one_kind([first_examples(one.examples, 1) for one in streams] + [held], given)
    if not alone:
        counts = [taken(part.count, one.weight) for part, one in zip(streams, given, strict=True)]
        said += share_lines(given, [part.count for part in streams], counts)
    say(said, console)
    if held:
        return train, held, stream
    if not train[size:]:
        raise ValueError(f"eval_size {size} leaves nothing to train on of {len(train)} examples; give eval_data")
    return train[size:], train[:size], replace(stream, examples=stream.examples.skip(size))


def own_heldout(recipe: Recipe, given: list[Source], reading: Reading, found: Findings) -> list[dict]:
    """Return the examples of a stream's `eval_data`, or of the part of its folder that is named as held out."""
    if recipe.eval_data:
        source = Source(recipe.eval_data, columns=recipe.columns, system=recipe.system)
        records = read_records(recipe.eval_data, None, reading, one_split=True)
        return at_most_eval_size(convert_records(records, rules=rules_of(recipe, source, found)), recipe)
    held = []
    for source in given:
        folder = user_path(source.path)
        parts = folder_parts(folder, None, KINDS) if folder.is_dir() and any(folder.iterdir()) else None
        if parts is not None and "validation" in parts.files:
            records = read_files(parts.files["validation"], folder, reading)
            held += convert_records(records, rules=rules_of(recipe, source, found))
    return at_most_eval_size(held, recipe) if held else []


def train_and_heldout(
    recipe: Recipe,
    convert: Convert,
    console: Console,
    key: Callable[[dict], str] | None = None,
    cut: Callable[[list[list[dict]]], tuple[list[list[dict]], list[dict]]] | None = None,
) -> tuple[list[dict], list[dict]]:
    """Return a recipe's training and held-out examples, which `convert` makes of records.

    `key` is that of `split_examples`; `cut` holds some of the sources' examples out in a way of its own.

    Held out is `eval_data`, else what a source holds out itself, else a part of all sources. The rows of a source stand
    in the training examples as often as its weight says.
    """
    given = sources(recipe)
    reading = reading_of(recipe)
    found = Findings()
    parts, held = read_sources(recipe, given, convert, reading, found)
    said = [*dict.fromkeys(reading.notes), *found.lines()]
    check_one_kind([*parts, held], given)
    if held:
        held = at_most_eval_size(held, recipe)
        learned = {example_key(row) for part in parts for row in part}
        said += overlap(sum(example_key(row) in learned for row in held), len(held))
    else:
        parts, held = cut(parts) if cut else cut_heldout(recipe, parts, key)
    train = weigh(parts, given, recipe.seed)
    say(said + shares(given, parts, train), console)
    return [row for part in train for row in part], held


def read_sources(
    recipe: Recipe, given: list[Source], convert: Convert, reading: Reading, found: Findings
) -> tuple[list[list[dict]], list[dict]]:
    """Return the examples of each source, and those held out apart from them: `eval_data`, or parts of sources."""
    parts, held = [], []
    for source in given:
        rules = rules_of(recipe, source, found)
        splits = read_splits(source.path, source.split, reading)
        parts.append(convert(splits["train"], rules))
        if "validation" in splits and not recipe.eval_data:
            held += convert(splits["validation"], rules)
    if recipe.eval_data:
        source = Source(recipe.eval_data, columns=recipe.columns, system=recipe.system)
        held = convert(read_records(recipe.eval_data, None, reading, one_split=True), rules_of(recipe, source, found))
    return parts, held


def rules_of(recipe: Recipe, source: Source | None = None, found: Findings | None = None) -> Rules:
    """Return what a recipe says of the records of one of its sources."""
    source = source or sources(recipe)[0]
    skip = recipe.empty_answers == "skip"
    return Rules(
        source.columns,
        source.system,
        skip,
        tuple(recipe.ignore),
        recipe.chat_template_kwargs,
        recipe.answers == "last",
        "" if recipe.unlabelled == "none" else recipe.unlabelled,
        source=source.path,
        found=found or Findings(),
    )


def reading_of(recipe: Recipe) -> Reading:
    """Return how a recipe's files are read."""
    return Reading(recipe.encoding, recipe.tsv_quotes)


def at_most_eval_size(held: list[dict], recipe: Recipe) -> list[dict]:
    """Return the first of the held-out examples, as many as `eval_size` says."""
    size = recipe.eval_size or len(held)
    return held[: max(1, round(size * len(held)) if size < 1 else int(size))]


def check_one_kind(parts: list[list[dict]], given: list[Source]) -> None:
    """Refuse a mixture of plain text and answers, which are learned in different ways."""
    names = [source.path for source in given] + ["what is held out"]
    texts = {name: "text" in part[0] for name, part in zip(names, parts, strict=True) if part}
    if len(set(texts.values())) > 1:
        shown = ", ".join(f"{name} ({'plain text' if text else 'answers'})" for name, text in texts.items())
        raise ValueError(f"data: {shown}: plain text and answers are learned in different ways; train on one kind")


def cut_heldout(
    recipe: Recipe, parts: list[list[dict]], key: Callable[[dict], str] | None
) -> tuple[list[list[dict]], list[dict]]:
    """Return the sources' examples without those that are held out, and these, drawn from all sources alike."""
    made = [row for part in parts for row in part]
    builtin = recipe.data == "builtin"  # its file says which rows are held out: the last 100
    size = recipe.eval_size or (100 if builtin else min(100, max(1, len(made) // 10)))
    _, held = split_examples(made, size, None if builtin else recipe.seed, key)
    taken = set(map(id, held))
    return [[row for row in part if id(row) not in taken] for part in parts], held


def weigh(parts: list[list[dict]], given: list[Source], seed: int) -> list[list[dict]]:
    """Return the examples of an epoch by source: each as often as the source's weight says."""
    return [weighted(part, source.weight, seed, i) for i, (part, source) in enumerate(zip(parts, given, strict=True))]


def weighted(rows: list[dict], weight: float, seed: int, number: int) -> list[dict]:
    """Return each row as often as the whole part of `weight` says, and a share of them, its fraction, once more."""
    whole, extra = int(weight), round((weight - int(weight)) * len(rows))
    drawn = sorted(random.Random(f"{seed} {number}").sample(range(len(rows)), extra))
    return rows * whole + [rows[i] for i in drawn]


def shares(given: list[Source], parts: list[list[dict]], train: list[list[dict]]) -> list[str]:
    """Return what each source of a mixture contributes to an epoch."""
    if len(given) == 1 and given[0].weight == 1:
        return []
    return share_lines(given, list(map(len, parts)), list(map(len, train)))


def share_lines(given: list[Source], counts: list[int], taken: list[int]) -> list[str]:
    """Return a line for each source of a mixture: how many examples it has, and how many of them an epoch has."""
    total = sum(taken)
    if total == 0:
        raise ValueError("the weights of data leave no example to train on; raise them")
    return [
        f"{source.path}: {count} examples, weight {source.weight:g}: {own} of {total} an epoch ({own / total:.0%})"
        for source, count, own in zip(given, counts, taken, strict=True)
    ]


def overlap(count: int, total: int) -> list[str]:
    """Return a line where `count` of the held-out examples are training examples too."""
    return [f"{count} of {total} held-out examples are training examples too; their loss says less"] if count else []


def say(lines: list[str], console: Console) -> None:
    """Print what was found in the data, a line each."""
    for line in lines:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
