"""Nothing vanishes: columns by all rows, in any order, however they are read; what is not used is said or refused."""

import json
import random
import re
import shlex

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.data.columns import as_chat, assign_roles, survey
from inlay.data.formats import FORMATS, Rules, convert_records
from inlay.data.labelled import LABELLED_FORMATS, labelled_examples
from inlay.data.preferences import preference_examples
from inlay.data.readers import Reading, read_records
from inlay.data.streaming import open_stream

ASK, SAY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
RULE = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": [ASK], "completion": [SAY]}


def fault(function, *arguments, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller looks at the message
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def converted(*records, **rules):
    given = Rules(**rules)
    return convert_records(list(records), rules=given), given.found.lines()


MEANT = {  # what stands in a row, and the example that it means
    "input": ({"instruction": "Add.", "output": "4", "input": "2, 2"}, [[{**ASK, "content": "Add.\n\n2, 2"}], [SAY]]),
    "input of a question": ({"question": "Who?", "context": "Bob ran.", "answer": "4"},
                            [[{**ASK, "content": "Who?\n\nBob ran."}], [SAY]]),
    "null input": ({"instruction": "2 + 2?", "output": "4", "input": None}, [[ASK], [SAY]]),
    "NaN input": ({"instruction": "2 + 2?", "output": "4", "input": float("nan")}, [[ASK], [SAY]]),
    "number": ({"prompt": "2 + 2?", "completion": 4}, [[ASK], [SAY]]),
    "list of one": ({"prompt": "2 + 2?", "completion": ["4"]}, [[ASK], [SAY]]),
    "capitals": ({"Prompt": "2 + 2?", " Completion ": "4"}, [[ASK], [SAY]]),
    "system of instruction": ({"instruction": "2 + 2?", "output": "4", "system": "Be brief."}, [[RULE, ASK], [SAY]]),
    "system of prompt": ({"prompt": "2 + 2?", "answer": "4", "system_prompt": "Be brief."}, [[RULE, ASK], [SAY]]),
    "system of messages": ({"messages": [ASK, SAY], "system": "Be brief."}, [[RULE, ASK], [SAY]]),
    "system of ShareGPT": ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
                            "system": "Be brief."}, [[RULE, ASK], [SAY]]),
    "messages as JSON": ({"messages": json.dumps([ASK, SAY])}, [[ASK], [SAY]]),
    "history": ({"instruction": "2 + 2?", "output": "4", "history": [["a", "b"]]},
                [[{**ASK, "content": "a"}], [{**SAY, "content": "b"}, ASK, SAY]]),
    "history as JSON": ({"query": "2 + 2?", "response": "4", "history": '[["a", "b"]]'},
                        [[{**ASK, "content": "a"}], [{**SAY, "content": "b"}, ASK, SAY]]),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_what_a_row_means_is_used_whatever_row_has_it_first(name, tmp_path):
    """Other rows lack the optional columns; the order of rows, and reading or streaming, change nothing."""
    record, (prompt, completion) = MEANT[name]
    optional = {"input", "context", "system", "system_prompt", "history"}
    other = {key: cell for key, cell in record.items() if key not in optional}
    expected = {"prompt": prompt, "completion": completion}
    for rows in ([record, other], [other, record]):
        found, said = converted(*rows)
        assert found[rows.index(record)] == expected
        assert said == []
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))  # NaN as pandas and Python write it
        assert convert_records(read_records(str(path)), rules=Rules()) == found
        assert list(open_stream(str(path), Rules(), Reading()).examples) == found


OPTIONAL = st.fixed_dictionaries({}, optional={
    "input": st.sampled_from(["x", "", None]), "system": st.sampled_from(["Be brief.", ""]),
    "history": st.sampled_from([[], [["a", "b"]], None]), "id": st.integers(0, 9),
})  # fmt: skip


@given(st.lists(OPTIONAL, min_size=1, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_rows_does_not_matter(extras, chance: random.Random):
    rows = [{"instruction": str(i), "output": "4", **extra} for i, extra in enumerate(extras)]
    order = chance.sample(range(len(rows)), len(rows))
    found, said = converted(*rows)
    again, said_again = converted(*(rows[i] for i in order))
    assert again == [found[i] for i in order]
    assert said == said_again == (["not used: columns id"] if any("id" in row for row in rows) else [])


def test_a_column_that_first_comes_late_in_a_stream_counts(tmp_path):
    rows = [{"instruction": str(i), "output": "4"} for i in range(1500)] + [
        {"instruction": "Add.", "input": "2, 2", "output": "4", "extra": 1}
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rules = Rules()
    stream = open_stream(str(tmp_path / "a.jsonl"), rules, Reading())
    assert list(stream.examples)[-1]["prompt"][0]["content"] == "Add.\n\n2, 2"
    assert (stream.count, rules.found.lines()) == (1501, ["not used: columns extra"])


def test_columns_that_play_no_role_are_named_unless_they_hold_nothing():
    _, said = converted(
        {"prompt": "2 + 2?", "answer": "4", "response": "four", "id": 1, "empty": None, "more": []},
        {"prompt": "a", "response": "b", "note": "c"},
        skip_empty=True,
    )
    assert said == ["not used: columns answer, id, note"]


MATTERS = {  # what would change what is learned, and what would not
    "weight": ({"weight": 0}, {"weight": 1}), "train": ({"train": False}, {"train": True}),
    "loss": ({"loss": "0.5"}, {"loss": "1.0"}), "label": ({"label": False}, {"label": True}),
    "label as a number": ({"label": 0}, {"label": 1}),
    "tool calls": ({"tool_calls": [{"name": "f"}]}, {"tool_calls": []}),
}  # fmt: skip


@pytest.mark.parametrize("name", MATTERS)
def test_columns_that_change_what_is_learned_are_refused_by_name(name):
    changed, same = MATTERS[name]
    row, (column,) = {"prompt": "2 + 2?", "completion": "4"}, changed
    message = fault(converted, row, {**row, **changed})
    assert f"{column!r}" in message
    assert converted(row, {**row, **same})[0] == [PAIR, PAIR]
    (hint,) = re.findall(r"--ignore (\S+)", message)
    assert converted(row, {**row, **changed}, ignore=(hint,))[0] == [PAIR, PAIR]


def test_keys_of_messages_that_are_not_handled_are_refused_by_name():
    chat = [ASK, {**SAY, "mask": 0}]
    assert "message key 'mask'" in fault(converted, {"messages": chat})
    assert converted({"messages": chat}, ignore=("mask",))[0] == [PAIR]
    assert converted({"messages": [ASK, {**SAY, "weight": 0}, ASK, SAY]})[0][0]["completion"] == [SAY]


def test_a_label_beside_plain_text_judges_no_answer():
    assert converted({"text": "once", "label": 0}) == ([{"text": "once"}], ["not used: columns label"])


def test_a_system_column_and_another_system_message_are_refused():
    assert "another system message" in fault(converted, {"messages": [RULE, ASK, SAY], "system": "Be long."})
    assert converted({"messages": [RULE, ASK, SAY], "system": "Be brief."})[0] == [{**PAIR, "prompt": [RULE, ASK]}]


# -- rows without an answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [None, "", " \n", "\u200b", float("nan"), [], "absent"])
def test_rows_without_an_answer_are_refused_or_skipped_and_counted(answer, tmp_path):
    rows = [{"instruction": str(i), "output": "4"} for i in range(4)]
    rows[2] = {"instruction": "2"} | ({} if answer == "absent" else {"output": answer})
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    message = fault(converted, *(records := read_records(str(path))))
    assert "; --empty-answers skip leaves out the 1 without an answer" in message
    assert fault(convert_records, records, rules=Rules()).startswith("a.jsonl, line 5: ")
    assert fault(open_stream, str(path), Rules(), Reading()).startswith("a.jsonl, line 5: ")
    found, said = converted(*rows, skip_empty=True)
    assert [one["prompt"][0]["content"] for one in found] == ["0", "1", "3"]
    assert said == ["rows without an answer, skipped: 1"]
    rules = Rules(skip_empty=True)
    assert list(open_stream(str(path), rules, Reading()).examples) == found
    assert rules.found.lines() == said


def test_chats_without_an_answer_are_skipped_too():
    rows = [[ASK], [ASK, {**SAY, "content": ""}], [ASK, SAY], None]
    found, said = converted(*({"messages": chat} for chat in rows), skip_empty=True)
    assert (found, said) == ([PAIR], ["rows without an answer, skipped: 3"])
    assert "none of 1 rows has an answer" in fault(converted, {"prompt": "a", "completion": ""}, skip_empty=True)


def test_preferences_with_a_prompt_in_some_rows_only():
    chats = {side: [ASK, {**SAY, "content": side}] for side in ("chosen", "rejected")}
    texts = {"prompt": "2 + 2?", "chosen": "chosen", "rejected": "rejected"}
    for rows in ([chats, texts], [texts, chats]):
        first, second = preference_examples(rows, rules=Rules())
        assert first == second == {"prompt": [ASK], **{side: [{**SAY, "content": side}] for side in chats}}


# -- hints -------------------------------------------------------------------------------------------------------------

UNKNOWN = [
    {"sentence": "fine", "verdict": "good"}, {"Frage eins": "a", "Antwort: kurz": "b"}, {"body": "once"},
    {"talk": [ASK, SAY]}, {"prompt": "a", "reply": "b"}, {"id": 3, "q": "a", "a": "b", "n": 4}, {"q'": "a", "a": 5},
]  # fmt: skip


@pytest.mark.parametrize("record", UNKNOWN, ids=str)
def test_the_hint_for_unknown_columns_works_when_pasted(record):
    message = fault(converted, record)
    words = shlex.split(message.partition("map them: ")[2])
    assert words[0] == "--columns"
    assert converted(record, columns=yaml.safe_load(words[1]))[0]


def test_hints_of_other_tasks():
    rows = [{"review": "fine", "stars": 1}, {"review": "bad", "stars": 2}]
    words = shlex.split(fault(labelled_examples, rows).partition("map them: ")[2])
    assert [row["label"] for row in labelled_examples(rows, Rules(yaml.safe_load(words[1])))] == ["1", "2"]
    assert "--task preference" in fault(converted, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert "none" not in fault(assign_roles, survey([{"n": {}}]), {}, FORMATS)


def test_a_chat_is_read_from_json_and_text_is_not():
    assert as_chat(json.dumps([ASK])) == [ASK]
    assert as_chat("[role] play") is None
    assert as_chat("[{'role': 'user'}]") is None
    assert converted({"prompt": json.dumps([ASK]), "completion": "4"})[0][0]["prompt"][0]["content"] == json.dumps(
        [ASK]
    )


# -- labels ------------------------------------------------------------------------------------------------------------


def labels(*cells, **rules):
    return [row["label"] for row in labelled_examples([{"text": "a", "label": cell} for cell in cells], Rules(**rules))]


def test_a_label_is_the_same_in_every_spelling():
    assert labels(1, "1", 1.0, "1.0", " 1 ") == ["1"] * 5
    assert labels(True, "true", "TRUE", "True") == ["True"] * 4
    assert labels(0.5, "0.5", "01", "1e0", "good", "Good") == ["0.5", "0.5", "01", "1e0", "good", "Good"]


@pytest.mark.parametrize("cell", [-1, "-1", -1.0, None, "", float("nan")])
def test_rows_without_a_label_are_no_class(cell):
    assert "--empty-answers skip leaves out the 1" in fault(labels, 0, 1, cell)
    assert labels(0, 1, cell, skip_empty=True) == ["0", "1"]


def test_minus_one_among_scores_is_a_score():
    assert labels(-1, 0.5, 1) == ["-1", "0.5", "1"]


def test_a_pair_may_lack_its_second_text():
    rows = [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "a", "sentence2": None, "label": 0}]
    assert [row["pair"] for row in labelled_examples(rows)] == ["b", None]
    assert set(LABELLED_FORMATS) == {"pair", "sentence"}


def test_which_label_stands_for_none_is_told_by_the_others_or_by_the_run():
    assert labels(-1, 1, "1.0") == ["-1", "1", "1"]
    assert "--unlabelled none makes -1 a class" in fault(labels, -1, 0, 1)
    assert labels(-1, 0, 1, unlabelled="") == ["-1", "0", "1"]
    assert labels(0, 1, 99, -1, unlabelled="99", skip_empty=True) == ["0", "1", "-1"]


def test_words_that_may_be_meant_as_nothing_are_named():
    rows = [{"prompt": "a", "completion": word, "note": "NA"} for word in ("NA", "None", "NA", "no")]
    found, said = converted(*rows)
    assert [one["completion"][0]["content"] for one in found] == ["NA", "None", "NA", "no"]
    named = "'completion': 2 × NA, 1 × None, which are text; a cell that says nothing has to be empty"
    assert said == ["not used: columns note", named]
