"""Records in every form, in every kind of file, read or streamed, in any order: what is learned is what they say."""

import csv
import gzip
import json
import random
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from inlay.data.labelled import labelled_examples
from inlay.data.preferences import preference_examples
from inlay.data.readers import Reading, read_records
from inlay.data.render import IGNORED
from inlay.recipe.recipe import Recipe
from inlay.training.examples import load_examples, training_set
from inlay.training.tasks import TASKS

SILENT = Console(quiet=True)
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}


def messages(ask, say):
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]


def speakers(ask, say):
    return [{"from": "human", "value": ask}, {"from": "gpt", "value": say}]


FLAT = {  # of texts alone, so that a table can hold it
    "instruction": lambda ask, more, say: {"instruction": ask, "input": more, "output": say},
    "prompt-completion": lambda ask, more, say: {"prompt": ask, "input": more, "completion": say},
    "question-answer": lambda ask, more, say: {"question": ask, "context": more, "answer": say},
    "query-response": lambda ask, more, say: {"query": ask + more, "response": say, "id": "7"},
    "input-output": lambda ask, more, say: {"input": ask + more, "output": say},
    "E2E": lambda ask, more, say: {"mr": ask + more, "ref": say},
    "messages, as JSON": lambda ask, more, say: {"messages": json.dumps(messages(ask + more, say))},
    "text": lambda ask, more, say: {"text": say},
}
NESTED = {
    "messages": lambda ask, more, say: {"messages": messages(ask + more, say)},
    "ShareGPT": lambda ask, more, say: {"conversations": speakers(ask + more, say)},
    "prompt-completion, of messages": lambda ask, more, say: {
        "prompt": messages(ask + more, say)[:1],
        "completion": messages(ask, say)[1:],
    },
    "prompt-completion, a message": lambda ask, more, say: {
        "prompt": messages(ask + more, say)[:1],
        "completion": messages(ask, say)[1],
    },
}
TABLES, STREAMED = ("csv", "csv.gz", "tsv"), ("jsonl", "jsonl.gz", "csv", "tsv", "parquet", "arrow")
KINDS = ("jsonl", "jsonl.gz", "json", "parquet", "arrow", *TABLES)


def written(rows, kind, folder):
    """A file of such a kind with these records."""
    path = folder / f"rows.{kind}"
    if kind.startswith(("csv", "tsv")):
        with gzip.open(path, "wt", newline="") if kind.endswith("gz") else path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        text = "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    return str(path)


def squeezed(text):
    return "".join(text.split())


def texts(size=12):
    characters = st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn"])
    return st.text(characters, max_size=size).map(lambda text: f"{text}.").filter(lambda text: "<" not in text)


rows_of_texts = st.lists(st.tuples(texts(), st.one_of(st.just(""), texts()), texts()), min_size=1, max_size=4)


@given(
    form=st.sampled_from([*FLAT, *NESTED]), kind=st.sampled_from(KINDS), streaming=st.booleans(), made=rows_of_texts,
    seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=25, **SLOW)
def test_what_is_learned_is_what_the_record_says(form, kind, streaming, made, seed, real_tokenizer, tmp_path_factory):
    if form in NESTED and kind in TABLES:
        kind = "parquet"
    random.Random(seed).shuffle(made)
    folder = tmp_path_factory.mktemp("rows")
    (folder / "held.jsonl").write_text(json.dumps(next(iter((FLAT | NESTED)[form](*one) for one in made))))
    path = written([(FLAT | NESTED)[form](*one) for one in made], kind, folder)
    values = {"streaming": True, "steps": 1} if streaming and kind in STREAMED else {}
    recipe = Recipe(data=path, eval_data=str(folder / "held.jsonl"), tsv_quotes="quoted", **values)
    rows = training_set(load_examples(recipe, real_tokenizer, SILENT), real_tokenizer)
    found = []
    for row in rows if isinstance(rows, Dataset) else list(rows):
        shown = [real_tokenizer.decode(row["input_ids"], clean_up_tokenization_spaces=False)]
        learned = [token for token in row["labels"] if token != IGNORED]
        shown.append(real_tokenizer.decode(learned, clean_up_tokenization_spaces=False))
        found.append(tuple(map(squeezed, shown)))
    assert [learned for _, learned in found] == [squeezed(f"{say}<|im_end|>") for _, _, say in made]
    if form != "text":
        asked = [squeezed(f"<|im_start|>user{ask}{more}<|im_end|>") for ask, more, _ in made]
        assert all(question in text for question, (text, _) in zip(asked, found, strict=True))


PAIRS = {
    "texts": lambda ask, good, bad: {"prompt": ask, "chosen": good, "rejected": bad},
    "chats": lambda ask, good, bad: {"chosen": messages(ask, good), "rejected": messages(ask, bad)},
    "prompt and chats": lambda ask, good, bad: {
        "prompt": ask, "chosen": messages(ask, good), "rejected": messages(ask, bad),
    },
    "messages": lambda ask, good, bad: {
        "prompt": messages(ask, "")[:1], "chosen": messages(ask, good)[1:], "rejected": messages(ask, bad)[1],
    },
    "ShareGPT": lambda ask, good, bad: {
        "conversations": speakers(ask, "")[:1], "chosen": speakers(ask, good)[1], "rejected": speakers(ask, bad)[1],
    },
    "HH": lambda ask, good, bad: {
        "chosen": f"\n\nHuman: {ask}\n\nAssistant: {good}", "rejected": f"\n\nHuman: {ask}\n\nAssistant: {bad}",
    },
}  # fmt: skip


@pytest.mark.parametrize("form", PAIRS)
@given(made=st.lists(st.tuples(texts(), texts(), texts()).filter(lambda t: squeezed(t[1]) != squeezed(t[2])),
                     min_size=1, max_size=3), kind=st.sampled_from(("jsonl", "json", "parquet")))  # fmt: skip
@settings(max_examples=6, **SLOW)
def test_pairs_are_what_the_record_says(form, made, kind, real_tokenizer, tmp_path_factory):
    path = written([PAIRS[form](*one) for one in made], kind, tmp_path_factory.mktemp("pairs"))
    rows = preference_examples(read_records(path))
    dataset = TASKS["preference"].dataset(rows, real_tokenizer, Recipe(task="preference", data=path))
    for (ask, good, bad), row in zip(made, dataset, strict=True):
        sides = [
            squeezed(real_tokenizer.decode(row["prompt_ids"] + row[f"{side}_ids"])) for side in ("chosen", "rejected")
        ]
        head = squeezed(f"<|im_start|>user{ask}<|im_end|><|im_start|>assistant")
        for side, answer in zip(sides, (good, bad), strict=True):
            assert side.endswith(head + squeezed(f"{answer}<|im_end|>"))
        assert squeezed(real_tokenizer.decode(row["prompt_ids"])) in sides[0]


@given(made=st.lists(st.tuples(texts(), st.one_of(st.none(), texts()), st.sampled_from(["0", "1", "2"])),
                     min_size=1, max_size=4), kind=st.sampled_from(("jsonl", "csv", "tsv", "parquet")))  # fmt: skip
@settings(max_examples=10, **SLOW)
def test_labelled_texts_are_what_the_record_says(made, kind, real_tokenizer, tmp_path_factory):
    records = [{"sentence1": text, "sentence2": pair, "label": label} for text, pair, label in made]
    path = written(records, kind, tmp_path_factory.mktemp("labels"))
    rows = labelled_examples(read_records(path, None, Reading(tsv_quotes="quoted")))
    assert Counter(row["label"] for row in rows) == Counter(label for *_, label in made)
    for row in rows:
        row["labels"] = int(row["label"])
    dataset = TASKS["classification"].dataset(rows, real_tokenizer, Recipe(task="classification", data=path))
    for (text, pair, label), row in zip(made, dataset, strict=True):
        assert squeezed(real_tokenizer.decode(row["input_ids"])) == squeezed(text + (pair or ""))
        assert row["labels"] == int(label)
