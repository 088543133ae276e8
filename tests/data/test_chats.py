"""Chats: every form of a message in, conversations out; what a record says of its answers is kept or refused."""

import json

import pytest

from inlay.data.chats import (
    answer_text,
    chat_cell,
    conversation,
    learned_turns,
    template_arguments,
    tools_cell,
    turn_by_turn,
    with_system,
)

ASK = {"role": "user", "content": "2 + 2?"}
SAY = {"role": "assistant", "content": "4"}
RULE = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def said(*turns):
    return chat_cell(list(turns), "messages")


def fault(function, *arguments, **options):
    """The message of the ValueError that a call must end with; always one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller looks at the message
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("turn", "role"),
    [
        ({"role": "user", "content": "x"}, "user"),
        ({"from": "human", "value": "x"}, "user"),
        ({"role": "User", "content": "x"}, "user"),
        ({"from": "gpt", "value": "x"}, "assistant"),
        ({"role": "model", "content": "x"}, "assistant"),
        ({"role": "developer", "content": "x"}, "developer"),
        ({"role": "tool", "content": "x"}, "tool"),
        ({"role": "function", "content": "x"}, "tool"),
        ({"role": "ipython", "content": "x"}, "tool"),
        ({"from": "observation", "value": "x"}, "tool"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "user"),
        ({"role": "user", "content": ["x"], "tool_calls": None, "weight": None}, "user"),
        ({"role": "assistant", "content": [{"type": "text", "text": "\nx"}, {"type": "output_text", "text": ""}]},
         "assistant"),
    ],
)  # fmt: skip
def test_a_message_in_any_form(turn, role):
    assert said(turn) == [{"role": role, "content": "x"}]


def test_a_chat_may_be_json_in_a_column_of_text():
    assert chat_cell(json.dumps([ASK, SAY]), "messages") == [ASK, SAY]
    assert tools_cell(json.dumps([TOOL]), "tools") == [TOOL]
    assert template_arguments('{"enable_thinking": false}', "kwargs") == {"enable_thinking": False}


def test_what_the_template_may_read_stays():
    turn = {"role": "tool", "content": "", "tool_call_id": "c1", "name": "add", "reasoning_content": None}
    assert said(turn) == [{"role": "tool", "content": "", "tool_call_id": "c1", "name": "add"}]
    assert said({"role": "tool", "content": {"sum": 4}}) == [{"role": "tool", "content": '{"sum": 4}'}]
    assert said({**SAY, "reasoning_content": "two twice"})[0]["reasoning_content"] == "two twice"


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2, "c": None}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2, "b": 2}'}},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"from": "function_call", "value": '[{"name": "add", "parameters": {"a": 2, "b": 2}}]'},
    ],
)
def test_a_call_in_any_form(turn):
    assert said(turn) == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


def test_what_is_said_before_a_call_is_the_same_turn():
    call = {"from": "function_call", "value": json.dumps(CALL["function"])}
    (one,) = said({"from": "gpt", "value": "Let me look."}, call, call)
    assert one == {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]}
    assert answer_text(one).startswith('Let me look.\n{"name": "add", "arguments": {"a": 2')


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "training", "loss"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_an_answer_that_is_not_to_be_learned_is_context(key, value):
    chat = said(ASK, SAY | {"content": "FIVE", key: value}, ASK, SAY | {key: 1})
    assert [message.get("weight") for message in chat] == [None, 0, None, None]
    example = conversation(chat)
    assert (len(example["prompt"]), example["completion"]) == (3, [SAY])
    assert "no assistant message" in fault(conversation, chat[:2])


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([ASK, SAY | {"weight": -0.5}], "message 2: weight is -0.5; accepted: a number from 0 to 1000"),
        ([ASK, SAY | {"loss": "no"}], "message 2: loss is 'no'"),
        ([ASK, SAY | {"weight": 1, "train": False}], "message 2: weight and train say different things"),
        ([ASK | {"train": True}, SAY], "message 1 is by user, with train: True; only the assistant's are learned"),
        ([ASK, SAY | {"label": False}], "message 2 has 'label', which is not handled"),
        ([ASK, SAY | {"train_detail": [{"begin_offset": 0}]}], "'train_detail', which is not handled"),
        ([{"role": "critic", "content": "x"}], "message 1 is by 'critic'; accepted: system, developer, user"),
        ([{"content": "x"}], "message 1 has 'content'; accepted: role and content, or from and value"),
        ([ASK, {"role": "assistant", "content": ""}], "message 2 is empty"),
        ([ASK, {"role": "assistant", "content": None, "tool_calls": []}], "message 2 is empty"),
        ([ASK, SAY, SAY], "message 3 is by assistant, after assistant"),
        ([ASK, {"from": "function_call", "value": "{}"}], "message 2: the call {} cannot be read; accepted: {\"name\""),
        ([ASK, SAY | {"tool_calls": [{"name": "add", "arguments": "2, 2"}]}], "message 2: the call {'name': 'add'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "a part of type 'image_url'"),
        ([{"role": "user", "content": 4}], "message 1 is the int 4; accepted: text"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_faulty_message_is_named(turns, found):
    assert found in fault(said, *turns)


def test_tools_become_schemas_in_the_form_of_openai():
    bare = {"name": "add", "parameters": {"type": "object"}, "strict": None}
    for cell in (TOOL, [TOOL], [bare], json.dumps([bare]), [json.dumps(bare)]):
        assert tools_cell(cell, "tools") == [TOOL]
    assert [tools_cell(cell, "tools") for cell in (None, "", [], "[]")] == [None] * 4
    assert "tools holds 'add'; accepted: a list of tools" in fault(tools_cell, ["add"], "tools")


def test_arguments_of_the_template_are_a_mapping_of_its_own():
    assert template_arguments({"enable_thinking": False, "x": None}, "kwargs") == {"enable_thinking": False}
    assert template_arguments(None, "kwargs") == template_arguments("", "kwargs") == {}
    assert "kwargs is 'no'; accepted: a mapping" in fault(template_arguments, "no", "kwargs")
    assert "add_generation_prompt is not the chat template's" in fault(
        template_arguments, {"add_generation_prompt": True}, "kwargs"
    )


def test_a_conversation_keeps_all_its_turns():
    chat = [RULE, ASK, SAY, ASK, SAY, ASK]
    whole = conversation(chat, system="not this one", tools=[TOOL], arguments={"x": 1})
    assert whole == {
        "prompt": chat[:2], "completion": chat[2:], "tools": [TOOL], "chat_template_kwargs": {"x": 1},
    }  # fmt: skip
    assert learned_turns(whole) == [2, 4]
    last = conversation(chat, last=True)
    assert (last["prompt"], learned_turns(last)) == (chat[:4], [4])
    assert conversation(chat[1:], system="Be brief.")["prompt"] == chat[:2]
    about = {"tools": [TOOL], "chat_template_kwargs": {"x": 1}}
    assert turn_by_turn(whole) == [{"prompt": chat[:i], "completion": [SAY], **about} for i in (2, 4)]


def test_an_answer_to_nothing_is_context():
    example = conversation([{"role": "assistant", "content": "Welcome."}, ASK, SAY])
    assert (len(example["prompt"]), example["completion"]) == (2, [SAY])
    for chat in ([], [ASK], [SAY], [SAY, ASK], [RULE, SAY]):
        assert "no assistant message; accepted: at least one" in fault(conversation, chat)


def test_tools_in_the_system_message_are_the_conversations():
    example = conversation(said(RULE | {"tools": [TOOL]}, ASK, SAY))
    assert (example["prompt"][0], example["tools"]) == (RULE, [TOOL])


def test_a_system_column_of_numbers_beside_a_chat():
    chat = [{"role": "system", "content": "7"}, {"role": "user", "content": "a"}]
    assert with_system(chat, 7, "system") == chat
    with pytest.raises(ValueError, match="message 1 is another system message"):
        with_system(chat, 8, "system")
