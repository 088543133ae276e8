"""Files and columns as strangers have them: what each means, or the line that says what to do."""

import gzip
import io
import json
import zipfile

import pytest

from inlay.data.formats import convert_records
from inlay.data.readers import read_records
from inlay.recipe.recipe import Recipe
from inlay.training.mixture import reading_of, rules_of

ASK, SAY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
PAIR = [("2 + 2?", "4")]
ROWS = [{"prompt": "2 + 2?", "completion": "4"}]
TABLE = "prompt,completion\n2 + 2?,4\n"


def lines(*rows):
    return "\n".join(map(json.dumps, rows))


def zipped(name, content):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, content)
    return out.getvalue()


def answers(name, content, folder, **settings):
    """What is learned of a file, as its last questions and answers."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    recipe = Recipe(data=str(path), **settings)
    found = convert_records(read_records(str(path), None, reading_of(recipe)), rules=rules_of(recipe))
    chats = [one["prompt"] + one["completion"] for one in found]
    return [(chat[-2]["content"], chat[-1]["content"]) for chat in chats]


def row(**cells):
    return "a.jsonl", lines(cells), {}


MEANT = {  # (file, content, settings) that mean PAIR
    "a chat a line": ("a.jsonl", lines([ASK, SAY]), {}),
    "a list of chats": ("a.json", json.dumps([[ASK, SAY]]), {}),
    "one chat": ("a.json", json.dumps([ASK, SAY], indent=1), {}),
    "another suffix of JSON lines": ("a.ndjson", lines(*ROWS), {}),
    "and packed": ("a.NDJSON.gz", gzip.compress(lines(*ROWS).encode()), {}),
    "lines of an old Macintosh": ("a.csv", TABLE.replace("\n", "\r"), {}),
    "lines of Windows": ("a.csv", "\ufeff" + TABLE.replace("\n", "\r\n"), {}),
    "UTF-16 without its mark": ("a.csv", TABLE.encode("utf-16-le"), {"encoding": "utf-16-le"}),
    "UTF-32": ("a.csv", TABLE.encode("utf-32"), {"encoding": "utf-32"}),
    "spaces in names": row(**{"System Prompt": "Be brief.", "Prompt": "2 + 2?", "Completion": "4"}),
    "a system message": row(system_message="Be brief.", prompt="2 + 2?", completion="4"),
    "a chat's history": row(chat_history=[["Hi", "Hello"]], instruction="2 + 2?", output="4"),
    "the whole prompt in the input": row(instruction="", input="2 + 2?", output="4"),
    "an answer of SQuAD": row(question="2 + 2?", answers={"text": ["4"], "answer_start": [7]}),
    "a question and a response": row(question="2 + 2?", response="4"),
    "a message as the completion": row(prompt=[ASK], completion=SAY),
    "messages with keys of both kinds": row(messages=[{"role": "user", "value": "2 + 2?"}, SAY]),
    "all answers are good ones": row(prompt="2 + 2?", completion="4", is_correct=True),
    "a picture that is not used": ("a.jsonl", lines({**ROWS[0], "image": "a.png"}), {"ignore": ["image"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_what_a_file_means(name, tmp_path):
    file, content, settings = MEANT[name]
    assert answers(file, content, tmp_path, **settings) == PAIR


REFUSED = {  # (file, content, settings), and what the line says
    "zip": ("a.jsonl", zipped("b.jsonl", lines(*ROWS)), {}, ["a zip file or a workbook: unzip it"]),
    "gzip": ("a.jsonl", gzip.compress(lines(*ROWS).encode()), {}, ["a gzip file", "mv a.jsonl a.jsonl.gz"]),
    "parquet": ("a.csv", b"PAR1" + bytes(99), {}, ["a Parquet file", "mv a.csv a.parquet"]),
    "workbook": ("a.xlsx", "PK", {}, ["found the suffix '.xlsx'", "save the sheet as CSV"]),
    "no suffix": ("a", lines(*ROWS), {}, ["found a name without a suffix"]),
    "JSON as text": ("a.txt", lines(*ROWS), {}, ["found JSON", "mv a.txt a.jsonl"]),
    "UTF-16 without its mark": ("a.csv", TABLE.encode("utf-16-le"), {}, ["as UTF-16-LE has", "--encoding utf-16-le"]),
    "UTF-32": ("a.csv", TABLE.encode("utf-32"), {}, ["--encoding utf-32"]),
    "objects of several lines": ("a.jsonl", json.dumps(ROWS[0], indent=1), {}, ["line 1", "jq -c . a.jsonl > l"]),
    "objects on one line": ("a.jsonl", json.dumps(ROWS[0]) * 2, {}, ["line 1", "jq -c . a.jsonl > lines.jsonl"]),
    "a message a row": ("a.csv", "id,role,content\n1,user,hi\n", {}, ["the rows are messages", "a row for each chat"]),
    "messages of other keys": (
        *row(messages=[{"speaker": "user", "text": "hi"}]),
        ["message 1 has 'speaker', 'text'; accepted: role and content, or from and value"],
    ),
    "a bad answer": (*row(question="2 + 2?", answer="5", is_correct=False), ["'is_correct' says of some rows"]),
    "a picture": (*row(prompt="What is it?", completion="4", image="a.png"), ["column 'image' changes", "--ignore im"]),
    "several right answers": (*row(question="2 + 2?", answers=["4", "four"]), ["answers is the list ['4', 'four']"]),
    "an empty answer in a chat": (
        *row(messages=[ASK, {**SAY, "content": " "}, ASK, SAY]),
        ["message 2 is empty", "--empty-answers skip"],
    ),
    "the same fault twice": (
        "a.jsonl", lines(*[{"question": "2 + 2?", "answer": 0.5}] * 2), {},
        ["line 1: answer is the float 0.5; accepted: text (2 rows at fault, next a.jsonl, line 2)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do(name, tmp_path):
    file, content, settings, parts = REFUSED[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the table says what it says
        answers(file, content, tmp_path, **settings)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_a_zero_byte_within_a_text_stays(tmp_path):
    assert answers("a.csv", TABLE.replace("4", "a\0b"), tmp_path) == [("2 + 2?", "a\0b")]


def test_rows_of_letters_are_no_chat(tmp_path):
    """A list of records with senders is one of records."""
    mail = [{"from": "ann@here", "prompt": "2 + 2?", "completion": "4"}]
    assert answers("a.json", json.dumps(mail), tmp_path) == PAIR
