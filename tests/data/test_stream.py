"""Data that is read as it is trained on: the same examples in the same order as when it is read at once."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from inlay.data import streaming
from inlay.data.formats import Rules, convert_records
from inlay.data.readers import Reading
from inlay.data.streaming import first_examples, open_stream
from inlay.recipe.recipe import Recipe
from inlay.training.examples import load_examples, token_dataset, training_set

ROWS = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(250)]


def stream_of(source):
    return open_stream(source, Rules(), Reading()).examples


@pytest.fixture(params=["jsonl", "parquet"])
def shards(request, tmp_path):
    """Three shards, the middle one of one record."""
    for number, rows in enumerate((ROWS[:120], ROWS[120:121], ROWS[121:])):
        path = tmp_path / f"part-{number}.{request.param}"
        if request.param == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return tmp_path / f"part-*.{request.param}"


def test_a_stream_is_what_the_files_hold_in_order(shards):
    expected = convert_records(ROWS)
    assert list(stream_of(str(shards))) == expected
    assert list(stream_of(str(shards.parent))) == expected
    assert first_examples(stream_of(str(shards)), 3) == expected[:3]


def test_what_is_held_out_of_a_stream_is_not_trained_on(shards, real_tokenizer):
    recipe = Recipe(data=str(shards), streaming=True, steps=1, eval_size=7)
    rows = load_examples(recipe, real_tokenizer, Console(quiet=True))
    assert rows.heldout == convert_records(ROWS[:7])
    assert list(training_set(rows, real_tokenizer)) == list(token_dataset(convert_records(ROWS[7:]), real_tokenizer))
    assert [name for name, *_ in rows.shards] == sorted(path.name for path in shards.parent.iterdir())


def test_a_record_of_another_format_is_said(tmp_path):
    rows = [*ROWS[:3], {"question": "What is no answer?", "answer": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="answer is empty"):
        list(stream_of(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("names", "says"), [([], "found no file"), (["a.csv"], "found .csv"), (["a.jsonl", "b.parquet"], "all of one kind")]
)
def test_what_cannot_be_streamed_is_refused(names, says, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=says):
        streaming.shards(str(tmp_path))


def test_a_stream_needs_steps():
    with pytest.raises(ValueError, match="streaming needs steps"):
        Recipe(streaming=True)
