"""Files as people have them: each form of file gives the records it means, or a line that says what to do."""

import csv
import gzip
import io
import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from inlay.data.folders import split_of
from inlay.data.formats import Rules, convert_records
from inlay.data.readers import Reading, read_records, read_splits
from inlay.data.streaming import open_stream

ROWS = [{"prompt": f"ask {i}", "completion": f"say {i}"} for i in range(3)]
TEXT = "\n".join(map(json.dumps, ROWS))
TABLE = "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in ROWS)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def fault(function, *arguments, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller looks at the message
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def arrow(rows, make):
    out = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    with make(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


SAME = {  # name -> content that stands for ROWS
    "lines.jsonl": TEXT,
    "blank lines and a BOM.jsonl": "\ufeff\n" + TEXT.replace("\n", "\r\n\r\n") + "\n\n",
    "list.jsonl": json.dumps(ROWS),
    "pretty list.jsonl": json.dumps(ROWS, indent=1),
    "list.json": json.dumps(ROWS),
    "lines.json": TEXT + "\n",
    "wrapped.json": json.dumps({"version": "1.1", "data": ROWS}),
    "wrapped pretty.json": json.dumps({"rows": ROWS}, indent=2),
    "packed.jsonl.gz": gzip.compress(TEXT.encode()),
    "packed.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "packed.csv.gz": gzip.compress(TABLE.encode()),
    "comma.csv": TABLE,
    "semicolon.csv": "\ufeff" + TABLE.replace(",", ";"),
    "tabs.csv": TABLE.replace(",", "\t"),
    "sep.csv": "sep=;\r\n" + TABLE.replace(",", ";"),
    "index.csv": "".join(f"{'' if i == 0 else i - 1},{line}\n" for i, line in enumerate(TABLE.splitlines())),
    "index of a part.csv": f",{TABLE.splitlines()[0]}\n" + "".join(
        f"{7 * i % 5},{line}\n" for i, line in enumerate(TABLE.splitlines()[1:])),
    "empty rows and columns.csv": "".join(f"{line},,\n" for line in TABLE.splitlines()) + ",,,\n,,,\n",
    "spaces in the header.csv": TABLE.replace("prompt,", " prompt , "),
    "tabs.tsv": TABLE.replace(",", "\t"),
    "all quoted.tsv": "".join('"' + line.replace(",", '"\t"') + '"\n' for line in TABLE.splitlines()),
    "index.tsv": "".join(f"{'' if i == 0 else i - 1}\t{line}\n".replace(",", "\t")
                         for i, line in enumerate(TABLE.splitlines())),
    "stream.arrow": arrow(ROWS, pyarrow.ipc.new_stream),
    "file.arrow": arrow(ROWS, pyarrow.ipc.new_file),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same_records_in_every_form(name, write):
    assert read_records(write(name, SAME[name])) == ROWS


def test_what_is_left_out_of_a_file_is_said(write):
    for name, said in (
        ("wrapped.json", "records are under 'data'; not used: version"),
        ("semicolon.csv", "separated by ';'"),
        ("index.csv", "the first column has no name and holds row numbers; it is left out"),
        ("index of a part.csv", "holds row numbers"),
    ):
        reading = Reading()
        read_records(write(name, SAME[name]), None, reading)
        assert [said in note for note in reading.notes] == [True], name


CELLS = [
    {"prompt": 'He said "no"', "completion": "plain"},
    {"prompt": "tab\there", "completion": 'a "b", c\nsecond line'},
    {"prompt": "", "completion": "long " * 40_000},
]


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_cells_of_any_kind_come_back_from_csv_and_tsv(delimiter, quoting, write):
    text = io.StringIO()
    writer = csv.DictWriter(text, CELLS[0], delimiter=delimiter, quoting=quoting, lineterminator="\n")
    writer.writeheader()
    writer.writerows(CELLS)
    assert read_records(write("a.tsv" if delimiter == "\t" else "a.csv", text.getvalue())) == CELLS


GLUE = 'sentence\tlabel\n"Yes," he said\t1\nthe so-called "best" film\t0\n"open\t1\n'


def test_quotation_marks_in_tsv_are_text_in_glue_and_enclose_fields_elsewhere(write):
    def cells(text, quotes="auto"):
        return [row["sentence"] for row in read_records(write("a.tsv", text), None, Reading(tsv_quotes=quotes))]

    assert cells(GLUE) == ['"Yes," he said', 'the so-called "best" film', '"open']
    assert cells('sentence\tlabel\n"He said ""no"""\t1\n') == ['He said "no"']
    assert cells('sentence\tlabel\n"one\ntwo"\t1\nthree\t0\n') == ["one\ntwo", "three"]
    assert cells('sentence\tlabel\n"Yes."\t1\nNo.\t0\n') == ['"Yes."', "No."]
    either = 'sentence\tlabel\n"I am here\t0\nand I go"\t1\nNo\t0\nNo\t0\n'
    message = fault(cells, either)
    assert "may enclose fields or belong to the text" in message
    for quotes, rows in (("quoted", ["I am here\t0\nand I go", "No", "No"]), ("plain", ['"I am here', 'and I go"'])):
        assert f"--tsv-quotes {quotes}" in message
        assert cells(either, quotes)[: len(rows)] == rows
    excel = 'sentence\tlabel\n"Yes, I do."\t1\nNo.\t0\n'
    assert "--tsv-quotes" in fault(cells, excel)


REFUSED = {  # name -> content, what the line says
    "comma.json": ('[\n {"a": 1},\n {"a": 2},\n]', ["line 4: found a comma with nothing after it (line 3)", "remove"]),
    "several.json": ('{"train": [{"a": 1}], "test": [{"a": 2}]}', ["several lists: train, test", "jq .train"]),
    "chat.json": ('{"messages": [{"role": "user", "content": "a"}]}', ["one object alone is written in [ ]"]),
    "columns.json": ('{"prompt": {"0": "a"}, "completion": {"0": "b"}}', ["orient='records', lines=True"]),
    "twice.jsonl": ('{"a": 1}\n{"a": 1, "a": 2}', ["line 2", "the key 'a' twice"]),
    "unnamed.csv": ("prompt,\na,b\n", ["line 1: found no name for column 2, which holds 'b'"]),
    "headless.csv": ("I am here,0\nI go,1\n", ["line 1", "a header of column names; '0' is a number or too long"]),
    "long.csv": ("prompt," + "x" * 200_000 + "\na,b\n", ["line 1", "xxx... is a number or too long for one"]),
    "ragged.csv": ("a,b\nc,d, e\n", ["line 2: found 3 fields", "in quotes"]),
    "windows.csv": ("prompt,completion\ncafé,x\n".encode("cp1252"), ["line 2: found byte 0xe9", "--encoding cp1252"]),
    "windows.jsonl": ('{"a": "b"}\n{"a": "é"}'.encode("cp1252"), ["line 2", "--encoding cp1252"]),
    "excel.csv": (TABLE.encode("utf-16"), ["--encoding utf-16"]),
    "packed.jsonl.gz": (gzip.compress(TEXT.encode())[:-9], ["cannot be unpacked"]),
    "twice.jsonl.gz": (
        gzip.compress(gzip.compress(TEXT.encode())),
        ["a gzip file within it: gunzip -c twice.jsonl.gz > twice.jsonl"],
    ),
    "none.jsonl.gz": (b"x", ["cannot be unpacked"]),
    "a.jsonl.zst": ("x", ["found the suffix '.zst'", "zstd -d a.jsonl.zst"]),
    "none.arrow": ("x" * 100, ["an Arrow file"]),
    "none.parquet.gz": ("x", ["found the suffix '.gz'"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_what_to_do(name, write):
    content, parts = REFUSED[name]
    message = fault(read_records, write(name, content))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_header_longer_than_the_limit_of_csv_is_read(delimiter, write):
    """131,072 characters, which is csv's limit for one cell, are none for a line."""
    names = [f"column{i}" for i in range(15_000)]
    assert len(delimiter.join(names)) > csv.field_size_limit()
    (row,) = read_records(write("wide.csv", "".join(delimiter.join(line) + "\n" for line in (names, names[::-1]))))
    assert list(row) == names
    assert list(row.values()) == names[::-1]
    long = "x" * 200_000
    assert read_records(write("cell.csv", f'prompt{delimiter}answer\n"{long}"{delimiter}b\n')) == [
        {"prompt": long, "answer": "b"}
    ]


@pytest.mark.parametrize("name", ["windows.csv", "windows.jsonl", "excel.csv"])
def test_the_encoding_that_a_refusal_names_reads_the_file(name, write):
    path = write(name, REFUSED[name][0])
    (encoding,) = re.findall(r"--encoding (\S+)", fault(read_records, path))
    assert "é" in str(read_records(path, None, Reading(encoding))) or name == "excel.csv"


# -- folders -----------------------------------------------------------------------------------------------------------


def lines(*names):
    return "\n".join(json.dumps({"text": name}) for name in names)


def parts_of(folder, split=None):
    reading = Reading()
    found = read_splits(str(folder), split, reading)
    return {name: [row["text"] for row in rows] for name, rows in found.items()}, reading.notes


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"), ("gsm8k-train-00000-of-00002.parquet", "train"), ("my_training_set.csv", "train"),
        ("validation.jsonl", "validation"), ("dev.tsv", "validation"), ("valid-1.jsonl", "validation"),
        ("test.jsonl", "test"), ("constrain.jsonl", None), ("latest.jsonl", None), ("train_test.jsonl", None),
        ("data.jsonl", None),
    ],
)  # fmt: skip
def test_a_name_tells_its_split_by_whole_words(name, split, tmp_path):
    assert split_of(tmp_path / name, tmp_path) == split


def test_a_folder_with_splits_trains_on_train_holds_out_validation_and_leaves_test(write, tmp_path):
    for name in ("train-2", "train-1", "validation", "test", "more"):
        write(f"{name}.jsonl", lines(name))
    for name in (
        ".hidden.jsonl",
        "_SUCCESS",
        "README.md",
        "LICENSE.txt",
        "dataset_info.json",
        "notes.docx",
        "x.parquet.gz",
    ):
        write(name, "{")
    found, notes = parts_of(tmp_path)
    assert found == {"train": ["train-1", "train-2"], "validation": ["validation"]}
    assert notes[0].endswith("passed over notes.docx, x.parquet.gz")
    assert "trained on train-1.jsonl, train-2.jsonl, held out validation.jsonl, left more.jsonl, test.jsonl" in notes[1]
    assert parts_of(tmp_path, "test") == ({"train": ["test"]}, notes[:1])
    assert parts_of(tmp_path, "dev")[0] == {"train": ["validation"]}
    assert "test.jsonl" in fault(read_records, str(tmp_path), one_split=True)


@pytest.mark.parametrize(
    ("names", "train"),
    [
        (["a.jsonl", "b.jsonl"], ["a", "b"]),
        (["test.jsonl"], ["test"]),
        (["all.jsonl", "test.jsonl"], ["all"]),
        (["data/train.jsonl", "data/test.jsonl"], ["train"]),
        (["train/x.jsonl", "validation/y.jsonl", "old/z.jsonl"], ["x"]),
    ],
)
def test_the_files_of_a_folder_that_are_trained_on(names, train, write, tmp_path):
    for name in names:
        write(name, lines(name.split("/")[-1].removesuffix(".jsonl")))
    assert parts_of(tmp_path)[0]["train"] == train


def test_splits_of_which_none_is_trained_on_are_refused(write, tmp_path):
    for name in ("test", "validation"):
        write(f"{name}.jsonl", lines(name))
    assert "found the splits test, validation; accepted: the name of one of them with --split" in fault(
        read_records, str(tmp_path)
    )


def test_a_part_of_a_split_is_drawn_by_weight(write, tmp_path):
    write("train.jsonl", lines("train"))
    assert "a part of it is drawn by weight: 0.8 in data" in fault(read_records, str(tmp_path), "train[:80%]")


def test_folders_of_save_to_disk(tmp_path):
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"x")
    assert read_records(str(tmp_path / "one")) == ROWS
    datasets.DatasetDict({"train": made.select([0, 1]), "validation": made.select([2])}).save_to_disk(tmp_path / "two")
    assert read_splits(str(tmp_path / "two")) == {"train": ROWS[:2], "validation": ROWS[2:]}


# -- columns of columnar files, and bounds -----------------------------------------------------------------------------


def test_dates_and_whole_numbers_are_text_wherever_they_are_read(write, tmp_path):
    rows = [{"prompt": f"day {i}", "completion": f"2024-01-0{i + 1}"} for i in range(3)]
    expected = convert_records(rows)
    (tmp_path / "text").mkdir()
    path = write("text/a.jsonl", "\n".join(map(json.dumps, rows)))
    assert list(open_stream(path, Rules(), Reading()).examples) == convert_records(read_records(path)) == expected
    days = pyarrow.array([row["completion"] for row in rows]).cast(pyarrow.date32())
    table = pyarrow.table({"prompt": [row["prompt"] for row in rows], "completion": days})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert convert_records(read_records(str(tmp_path / "a.parquet"))) == expected
    assert list(open_stream(str(tmp_path / "a.parquet"), Rules(), Reading()).examples) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_small_file_that_stands_for_gigabytes_is_refused(streaming, tmp_path):
    """One value that many rows share, and one row of many values: 20 GB and 0.3 GB of them in a kilobyte."""
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000, pyarrow.int32()), ["x" * 2**20])
    zeros = pyarrow.ListArray.from_arrays([0, 40_000_000], pyarrow.nulls(40_000_000))
    for name, column in (("shared", shared), ("zeros", zeros)):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path, compression="zstd")
        assert path.stat().st_size < 5_000
        before = pyarrow.total_allocated_bytes()
        read = (lambda path: open_stream(str(path), Rules(), Reading())) if streaming else read_records
        message = fault(read, *([path] if streaming else [str(path)]))
        assert "once decoded; accepted: at most 1000 times the file" in message
        assert pyarrow.default_memory_pool().max_memory() - before < 2**31


def test_a_packed_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("inlay.data.readers.LEAST", 2**20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 2**23))
    assert "more than 1.0 MiB once unpacked" in fault(read_records, str(tmp_path / "a.jsonl.gz"))
