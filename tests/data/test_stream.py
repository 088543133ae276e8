"""Data that is read as it is trained on: the same examples in the same order as when it is read at once."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from inlay.data import streaming
from inlay.data.formats import Rules, convert_records
from inlay.data.readers import Reading, read_records
from inlay.data.streaming import first_examples, open_stream
from inlay.recipe.recipe import Recipe
from inlay.training.examples import load_examples, token_dataset, training_set

ROWS = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(250)]


def stream_of(source):
    return open_stream(source, Rules(), Reading()).examples


@pytest.fixture(params=["jsonl", "parquet", "csv", "tsv"])
def shards(request, tmp_path):
    """Three shards, the middle one of one record."""
    for number, rows in enumerate((ROWS[:120], ROWS[120:121], ROWS[121:])):
        path = tmp_path / f"part-{number}.{request.param}"
        if request.param == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        elif request.param in ("csv", "tsv"):
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ROWS[0], delimiter="," if request.param == "csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
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
    ("names", "says"), [([], "found no file"), (["a.txt"], "found .txt"), (["a.jsonl", "b.parquet"], "all of one kind")]
)
def test_what_cannot_be_streamed_is_refused(names, says, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=says):
        streaming.shards(str(tmp_path))


def test_a_stream_needs_steps():
    with pytest.raises(ValueError, match="streaming needs steps"):
        Recipe(streaming=True)


TABLES = {  # name -> content; what stands in it comes the same whether it is read or streamed
    "semicolon.csv": 'question;answer\n"a; ""b""\nc";d\n' + "q;a\n" * 1500,
    "index.csv": ",question,answer\n" + "".join(f"{i},q {i},a\n" for i in range(1500)),
    "empty column.csv": "question,answer,\nq,a,\n,,\n",
    "mark.csv": "\ufeffquestion,answer\r\nq,a\r\n",
    "plain.tsv": "question\tanswer\nq\ta, b\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_streamed_as_it_is_read(name, tmp_path):
    path = tmp_path / name
    path.write_text(TABLES[name], newline="")
    read = Reading()
    assert list(stream_of(str(path))) == convert_records(read_records(str(path), None, read))
    streamed = Reading()
    open_stream(str(path), Rules(), streamed)
    assert [*dict.fromkeys(streamed.notes)] == read.notes


def test_what_the_beginning_of_a_table_does_not_tell_is_refused(tmp_path):
    def fault(name, text, quotes="auto"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - each line below looks at the message
            open_stream(str(tmp_path / name), Rules(), Reading(tsv_quotes=quotes))
        return str(caught.value)

    rows = "".join(f"{i},q {i},a\n" for i in range(1200))
    assert "line 1202: found 'x' in a column without a name" in fault("a.csv", ",question,answer\n" + rows + "x,q,a\n")
    assert "line 3: found 1 fields; accepted: 2" in fault("b.csv", "question,answer\nq,a\nq\n")
    quoted = 'question\tanswer\n"q"\ta\n'
    assert "--tsv-quotes quoted" in fault("c.tsv", quoted)
    for quotes, question in (("quoted", "q"), ("plain", '"q"')):
        (example,) = open_stream(str(tmp_path / "c.tsv"), Rules(), Reading(tsv_quotes=quotes)).examples
        assert example["prompt"][0]["content"] == question


def test_a_mixture_of_streams_has_the_rows_of_each_by_its_weight(tmp_path):
    names = {"a": 2.0, "b": 0.5, "c": 1.0}
    for name in names:
        rows = [{"question": f"{name} {i}", "answer": "x"} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    streams = [open_stream(str(tmp_path / f"{name}.jsonl"), Rules(), Reading()) for name in names]
    mixed = streaming.mix_streams(streams, list(names.values()))
    asked = [one["prompt"][0]["content"] for one in mixed.examples]
    assert asked == [one["prompt"][0]["content"] for one in mixed.examples]
    assert len(asked) == mixed.count == 16 + 4 + 8
    assert [one for one in asked if one[0] == "a"] == [f"a {i}" for i in range(8)] * 2
    assert [one for one in asked if one[0] == "b"] == ["b 1", "b 3", "b 5", "b 7"]
    assert [one for one in asked if one[0] == "c"] == [f"c {i}" for i in range(8)]
    half = [one[0] for one in asked[:14]]
    assert {name: half.count(name) for name in names} == {"a": 8, "b": 2, "c": 4}
    assert [name for name, *_ in mixed.shards] == ["a.jsonl", "b.jsonl", "c.jsonl"]
