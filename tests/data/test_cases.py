"""Inputs after public reports of people who fine-tune with other tools: what is learned of each, or why it is refused.

What goes wrong later than at reading is elsewhere: packing and groups in training/test_batches.py, uneven answers in
training/test_loss.py, added tokens in training/test_run_tokenizer.py, repeated rows in training/test_mixture.py.
"""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from inlay.data.audit import audit_examples
from inlay.data.chats import answer_text, is_learned
from inlay.data.formats import convert_records
from inlay.data.labelled import labelled_examples
from inlay.data.preferences import preference_examples
from inlay.data.readers import read_records, read_splits
from inlay.data.render import render
from inlay.data.streaming import open_stream
from inlay.recipe.recipe import Recipe
from inlay.training.mixture import reading_of, rules_of

ASK, SAY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": '{"city": "Oslo"}'}}
HI = ["user: hi", "assistant: ⟦yo⟧"]
ROW = {"prompt": "hi", "completion": "yo"}


def lines(*rows):
    return "\n".join(map(json.dumps, rows))


def parquet(rows):
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue().to_pybytes()


CASES = {  # name -> file, content, settings, and what is learned of it
    "csv_cp1252, as its refusal says": (
        "a.csv",
        "prompt,completion\nhi,café\n".encode("cp1252"),
        {"encoding": "cp1252"},
        ["user: hi", "assistant: ⟦café⟧"],
    ),
    "csv_header": ("a.csv", "Prompt, Completion\nhi,yo\n", {}, HI),
    "csv_index": ("a.csv", ",instruction,output\n0,hi,yo\n", {}, HI),
    "csv_na": ("a.csv", "prompt,completion\nhi,NA\n", {}, ["user: hi", "assistant: ⟦NA⟧"]),
    "csv_quotes": (
        "a.csv",
        '\ufeffprompt,completion\n"ask ""0"",\nsecond","say\n""0"", ok"\n',
        {},
        ['user: ask "0",\nsecond', 'assistant: ⟦say\n"0", ok⟧'],
    ),
    "csv_semicolon": ("a.csv", "\ufeffprompt;completion\nhi;yo\n", {}, HI),
    "content_parts": (
        "a.jsonl",
        lines(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "yo"}]},
                ]
            }
        ),
        {},
        HI,
    ),
    "developer_role": (
        "a.jsonl",
        lines({"messages": [{"role": "developer", "content": "Be brief."}, ASK, SAY]}),
        {},
        ["developer: Be brief.", *HI],
    ),
    "gpt_first": (
        "a.jsonl",
        lines(
            {
                "conversations": [
                    {"from": "gpt", "value": "Welcome."},
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "yo"},
                ]
            }
        ),
        {},
        ["assistant: Welcome.", *HI],
    ),
    "gz": ("a.jsonl.gz", gzip.compress(lines(ROW).encode()), {}, HI),
    "input_output": ("a.jsonl", lines({"input": "hi", "output": "yo"}), {}, HI),
    "json_is_jsonl": ("a.json", lines(ROW, ROW), {}, HI * 2),
    "jsonl_is_json": ("a.jsonl", json.dumps([ROW], indent=1), {}, HI),
    "json_nan": ("a.jsonl", '{"instruction": "hi", "input": NaN, "output": "yo"}', {}, HI),
    "json_wrapped": ("a.json", json.dumps({"data": [ROW]}), {}, HI),
    "list_answers": ("a.jsonl", lines({"prompt": "hi", "completion": ["yo"]}), {}, HI),
    "messages_string": ("a.jsonl", lines({"messages": json.dumps([ASK, SAY])}), {}, HI),
    "null_output, as its refusal says": (
        "a.jsonl",
        lines(ROW, ROW | {"completion": None}),
        {"empty_answers": "skip"},
        HI,
    ),
    "num_answers": ("a.jsonl", lines({"question": "hi", "answer": 4}), {}, ["user: hi", "assistant: ⟦4⟧"]),
    "openai_toolcalls": (
        "a.jsonl",
        lines(
            {
                "tools": [TOOL],
                "messages": [
                    ASK,
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
                    SAY,
                ],
            }
        ),
        {},
        ["user: hi", 'assistant: ⟦{"name": "time", "arguments": {"city": "Oslo"}}⟧', "tool: 12:00", "assistant: ⟦yo⟧"],
    ),
    "openai_toolcalls, mixed": (
        "a.jsonl",
        lines({"messages": [ASK, {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}]}),
        {},
        ["user: hi", 'assistant: ⟦Let me look.\n{"name": "time", "arguments": {"city": "Oslo"}}⟧'],
    ),
    "optional_input": (
        "a.jsonl",
        lines({"instruction": "hi", "output": "yo"}, {"instruction": "Say", "input": "w", "output": "m"}),
        {},
        [*HI, "user: Say\n\nw", "assistant: ⟦m⟧"],
    ),
    "optional_input, reordered": (
        "a.jsonl",
        lines({"instruction": "Say", "input": "w", "output": "m"}, {"instruction": "hi", "output": "yo"}),
        {},
        ["user: Say\n\nw", "assistant: ⟦m⟧", *HI],
    ),
    "parquet_dict": ("a.parquet", parquet([ROW] * 3), {}, HI * 3),
    "parquet_messages": ("a.parquet", parquet([{"id": 1, "messages": [ASK, SAY]}]), {}, HI),
    "query_response": ("a.jsonl", lines({"query": "hi", "response": "yo"}), {}, HI),
    "sharegpt_system": (
        "a.json",
        json.dumps(
            [
                {
                    "system": "Arr.",
                    "tools": '[{"name": "time"}]',
                    "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
                }
            ]
        ),
        {},
        ["system: Arr.", *HI],
    ),
    "tsv_newline": (
        "a.tsv",
        'prompt\tcompletion\nhi\t"one\ntwo\tend"\n',
        {},
        ["user: hi", "assistant: ⟦one\ntwo\tend⟧"],
    ),
    "tsv_quotes": (
        "a.tsv",
        'prompt\tcompletion\nhi\t"He said ""no"""\n',
        {},
        ["user: hi", 'assistant: ⟦He said "no"⟧'],
    ),
    "two_users": (
        "a.jsonl",
        lines({"messages": [ASK, {"role": "user", "content": "two"}, SAY, ASK]}),
        {},
        ["user: hi", "user: two", "assistant: ⟦yo⟧", "user: hi"],
    ),
    "unicode": (
        "a.jsonl",
        '{"prompt": "\u05e9\u200f hi", "completion": "\\ud83d\\udc69\u200d \u200bok\\u0000x"}',
        {},
        ["user: \u05e9\u200f hi", "assistant: ⟦\U0001f469\u200d \u200bok\0x⟧"],
    ),
    "weight_zero": (
        "a.jsonl",
        lines({"messages": [ASK, {**SAY, "content": "FIVE", "weight": 0}, ASK, {**SAY, "weight": 1}]}),
        {},
        ["user: hi", "assistant: FIVE", *HI],
    ),
}


def read(name, content, folder, **settings):
    """The examples of a file, as a run has them."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    recipe = Recipe(data=str(path), **settings)
    return convert_records(read_records(str(path), None, reading_of(recipe)), rules=rules_of(recipe))


def shown(examples):
    """The messages of examples, learned text in ⟦⟧."""
    for one in examples:
        place = len(one["prompt"])
        for i, message in enumerate(one["prompt"] + one["completion"]):
            text = answer_text(message)
            yield f"{message['role']}: " + (f"⟦{text}⟧" if i >= place and is_learned(message) else text)


@pytest.mark.parametrize("name", CASES)
def test_what_is_learned_of_a_case(name, tmp_path):
    file, content, settings, wanted = CASES[name]
    assert list(shown(read(file, content, tmp_path, **settings))) == wanted


REFUSED = {  # name -> file, content, and what the line says
    "csv_cp1252": (
        "a.csv",
        "prompt,completion\nhi,café\n".encode("cp1252"),
        "line 2: found byte 0xe9; .*--encoding cp1252",
    ),
    "json_comma": ("a.json", '[\n{"prompt": "hi"},\n]', r"line 3: found a comma with nothing after it \(line 2\)"),
    "null_output": (
        "a.jsonl",
        lines(ROW, ROW | {"completion": None}),
        "line 2: completion is empty.*--empty-answers skip",
    ),
    "tool_roles": (
        "a.jsonl",
        lines(
            {
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "function_call", "value": "{}"},
                    {"from": "observation", "value": "{}"},
                    {"from": "gpt", "value": "yo"},
                ]
            }
        ),
        r"message 2: the call \{\} cannot be read; accepted",
    ),
    "unicode, nothing to see": ("a.jsonl", lines(ROW | {"completion": "\u200b"}), "line 1: completion is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_why_a_case_is_refused(name, tmp_path):
    file, content, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        read(file, content, tmp_path)


def test_cases_that_the_chat_template_decides(tmp_path, real_tokenizer):
    """The built-in model's template shows no tools, keeps thoughts, and knows no developer."""

    def audited(row):
        return audit_examples(read("a.jsonl", lines(row), tmp_path), real_tokenizer, None)

    for row in ({"tools": [TOOL], "messages": [ASK, SAY]}, {"tools": '[{"name": "time"}]', "messages": [ASK, SAY]}):
        with pytest.raises(ValueError, match="does not show the tools in 1 of 1 conversations; chat_template: FILE"):
            audited(row)
    with pytest.raises(ValueError, match="does not show the calls of tools in 1 of 1"):
        audited({"messages": [ASK, {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}]})
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n42"}
    audit = audited({"messages": [ASK, thought]})
    assert audit.notes == []
    assert "⟦<think>\nhm\n</think>\n\n42<|im_end|>⟧" in render(audit.sequences[0], real_tokenizer, None).marked(
        real_tokenizer
    )
    (note,) = audited({"messages": [{"role": "developer", "content": "Be brief."}, ASK, SAY]}).notes
    assert note.startswith("the developer's message is the system message in 1 of 1")
    assert len(audited({"messages": [ASK, ASK, SAY, ASK]}).notes) == 2


def test_double_bos_and_text_that_is_templated_already(real_tokenizer):
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    ids = render({"text": text}, real_tokenizer, None).ids
    assert ids.count(real_tokenizer.bos_token_id) == text.count(real_tokenizer.bos_token)
    assert ids.count(real_tokenizer.eos_token_id) == text.count(real_tokenizer.eos_token)


def test_stream_optional(tmp_path):
    """A column that first comes late is there in every form."""
    rows = [{"instruction": f"Name {i}", "output": "x"} for i in range(30)]
    rows.append({"instruction": "Translate", "input": "w", "output": "m"})
    whole = read("a.jsonl", lines(*rows), tmp_path)
    recipe = Recipe(data=str(tmp_path / "a.jsonl"), streaming=True, steps=1)
    assert list(open_stream(recipe.data, rules_of(recipe), reading_of(recipe)).examples) == whole
    assert whole[-1]["prompt"][-1]["content"] == "Translate\n\nw"


def test_folder_splits(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(lines(ROW | {"prompt": name}))
    found = read_splits(str(tmp_path))
    assert {part: [row["prompt"] for row in rows] for part, rows in found.items()} == {
        "train": ["train"], "validation": ["validation"],
    }  # fmt: skip


def test_preferences_have_their_prompt_once():
    sides = {side: [ASK, {**SAY, "content": side}] for side in ("chosen", "rejected")}
    talk = {side: f"\n\nHuman: hi\n\nAssistant: {side}" for side in sides}
    for row in ({"prompt": "hi", **sides}, talk):
        (one,) = preference_examples([row])
        assert one == {"prompt": [ASK], **{side: [{**SAY, "content": side}] for side in sides}}


def test_labels_of_any_spelling():
    rows = [{"text": "a", "label": label} for label in ("Positive", "positive", 0.0, 1)]
    assert [row["label"] for row in labelled_examples(rows)] == ["Positive", "positive", "0", "1"]
