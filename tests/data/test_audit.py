"""The audit: what a chat template makes of records that they do not say, counted and named with the way out."""

import copy
import re
from importlib.resources import files

import pytest

from inlay.data.audit import audit_examples
from inlay.data.chats import chat_cell, conversation
from inlay.data.render import render

ASK, SAY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}
RULE = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 'two "2"\nα', "b": [2, {"c": True}]}}}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def notes(real_tokenizer):
    """What the audit says of one conversation, in a chat template of its own or ChatML's with a part replaced."""

    def notes(*turns, template=CHATML, replaced=("", ""), times=1, stops=frozenset(), **about):
        tokenizer = copy.deepcopy(real_tokenizer)
        tokenizer.chat_template = template and template.replace(*replaced)
        assert template is None or replaced[0] == "" or tokenizer.chat_template != template
        example = conversation(chat_cell(list(turns or (ASK, SAY)), "messages"), **about)
        return audit_examples([example] * times, tokenizer, None, stops).notes

    return notes


def qwen():
    return files("trl").joinpath("chat_templates", "qwen2_5.jinja").read_text(encoding="utf-8")


def test_nothing_is_said_of_what_is_rendered_whole(notes):
    assert notes(RULE, ASK, SAY, ASK, SAY) == []
    assert notes(RULE, ASK, SAY, template=None) == []


def test_an_answer_that_loses_its_thoughts(notes):
    thought = SAY | {"content": "<think>\nseven times 2\n</think>\n\n14"}
    strips = ("message.content", "message.content.split('</think>')[-1]")
    (line,) = notes(ASK, thought, replaced=strips, times=12)
    assert line.startswith("the chat template drops part of 12 of 12 answers (such as '<think>\\nseven times 2")
    assert "chat_template: FILE" in line
    for template in (CHATML, None):
        (line,) = notes(ASK, SAY | {"reasoning_content": "let me see"}, template=template)
        assert "drops part of 1 of 1 answers (such as 'let me see')" in line


def test_a_shift_that_a_dropped_part_causes_is_not_blamed_on_tokens(real_tokenizer):
    tokenizer = copy.deepcopy(real_tokenizer)
    tokenizer.chat_template = CHATML.replace("message.content", "message.content.split('</think>')[-1]")
    example = conversation([ASK, SAY | {"content": "<think>\nseven\n</think>\n\n14"}])
    assert audit_examples([example], tokenizer, None).shifted == 0


def test_the_template_of_trl_is_the_way_out_where_there_is_one(real_tokenizer):
    tokenizer = copy.deepcopy(real_tokenizer)
    template = files("trl").joinpath("chat_templates", "deepseek_r1_distill.jinja").read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(re.findall("<｜[^｜]+｜>", template)))})
    tokenizer.chat_template = template
    example = conversation([ASK, SAY | {"content": "<think>\nseven\n</think>\n\n14"}])
    dropped, *_ = audit_examples([example], tokenizer, None).notes
    assert "drops part of 1 of 1" in dropped
    assert "chat_template: training is trl's for this model" in dropped


def test_an_answer_without_an_end_and_one_with_another_end(notes):
    (line,) = notes(replaced=("message.content + '<|im_end|>\n'", "message.content + '\n'"))
    assert "no end token follows 1 of 1 answers" in line
    (line,) = notes(replaced=("<|im_end|>", "<|endoftext|>"))
    assert "1 of 1 answers end with <|endoftext|>, which is not the tokenizer's end token <|im_end|>" in line
    assert notes(replaced=("<|im_end|>", "<|endoftext|>"), stops=frozenset({0})) == []


def test_what_begins_or_ends_twice(notes):
    (line,) = notes(ASK, SAY | {"content": "It is 4.<|im_end|>"})
    assert "1 of 1 answers end twice" in line
    (line,) = notes(replaced=("{% for", "{{ bos_token }}{% for"))
    assert "1 of 1 conversations begin with <|im_start|> twice" in line


def test_messages_that_the_template_leaves_out(notes):
    (line,) = notes(RULE, ASK, SAY, replaced=("{{ '<|im_start|>'", "{% if message.role == 'system' %}{% continue %}"
                    "{% endif %}{{ '<|im_start|>'"))  # fmt: skip
    assert "the chat template leaves out the system message in 1 of 1 conversations; chat_template: FILE" in line


@pytest.mark.parametrize(
    ("turns", "about", "found"),
    [
        ([ASK, SAY], {"tools": [TOOL]}, "does not show the tools in 1 of 1 conversations; chat_template: FILE"),
        ([ASK, SAY | {"tool_calls": [CALL]}], {}, "does not show the calls of tools in 1 of 1"),
        ([ASK | {"tools": [TOOL]}, SAY], {}, "does not read the key 'tools' of messages"),
    ],
)
def test_tools_that_the_template_does_not_show_are_refused(turns, about, found, notes):
    with pytest.raises(ValueError, match=re.escape(found)):
        notes(*turns, **about)
    if about or "tool_calls" in turns[-1]:
        with pytest.raises(ValueError, match="tools need a chat template, and this model has none"):
            notes(*turns, template=None, **about)


def test_answers_of_tools_that_the_template_does_not_show_are_refused(notes):
    chat = [ASK, SAY | {"tool_calls": [CALL]}, {"role": "tool", "content": "four"}, SAY]
    deaf = qwen().replace('message.role == "tool"', 'message.role == "never"')
    with pytest.raises(ValueError, match="does not show the answers of tools in 1 of 1 conversations"):
        notes(*chat, tools=[TOOL], template=deaf)


def test_tools_are_used_where_the_template_shows_them(notes):
    chat = [ASK, SAY | {"tool_calls": [CALL]}, {"role": "tool", "content": "four", "tool_call_id": "c1"}, SAY]
    assert notes(*chat, tools=[TOOL], template=qwen()) == ["not used: keys tool_call_id"]


def test_keys_are_used_or_named(notes):
    turns = [ASK | {"name": "Ann", "time": "12:00"}, SAY]
    assert notes(*turns) == ["not used: keys name, time"]
    assert notes(*turns, replaced=("message.content", "(message.name or '') + message.content")) == [
        "not used: keys time"
    ]
    about = {"arguments": {"thinking": True, "mood": "good"}}
    assert notes(**about) == ["not used: keys chat_template_kwargs mood, chat_template_kwargs thinking"]
    assert notes(**about, replaced=("{% for", "{{ mood }}{% for")) == ["not used: keys chat_template_kwargs thinking"]


def test_what_is_odd_in_the_order_of_messages(notes):
    lines = notes(SAY, ASK, ASK, SAY, ASK)
    assert [line.partition(" conversations ")[2] for line in lines] == [
        "two user messages follow each other; both are kept",
        "the assistant speaks first; that is context, not learned",
        "there are messages after the last answer; nothing is learned from them",
    ]
    (line,) = notes(RULE | {"role": "developer"}, ASK, SAY)
    assert line.startswith("the developer's message is the system message in 1 of 1 conversations")


def test_turn_by_turn_is_said_and_counted(notes, real_tokenizer):
    rewrites = ("message.content", "(message.content if loop.last or message.role == 'user' else '...')")
    (line,) = notes(ASK, SAY, ASK, SAY, replaced=rewrites)
    assert line == "1 of 1 conversations are learned turn by turn: the chat template rewrites earlier turns"
    (line,) = notes(ASK, SAY, ASK, SAY, template=None)
    assert line == "1 of 1 conversations are learned turn by turn: the model has no chat template"
    tokenizer = copy.deepcopy(real_tokenizer)
    tokenizer.chat_template = None
    examples = [conversation([ASK, SAY]), conversation([ASK, SAY, ASK, SAY])]
    found = audit_examples(examples, tokenizer, None)
    assert (found.total, len(found.sequences), found.answers) == (3, 3, 3)


def test_a_prompt_that_ends_otherwise_before_a_learned_answer(notes):
    (line,) = notes(replaced=("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"))
    assert "in 1 of 1 conversations the prompt alone ends with '<think>\\n', which is not before the learned" in line


def test_answers_are_counted_as_max_length_cuts_them(real_tokenizer):
    example = conversation([ASK, SAY] * 4)
    whole = audit_examples([example], real_tokenizer, None)
    assert (whole.total, whole.answers, whole.cut, whole.masked) == (1, 4, 0, 0)
    for limit in range(1, whole.longest):
        found = audit_examples([example], real_tokenizer, limit)
        assert found.longest == whole.longest == found.mean_tokens
        assert found.masked <= found.cut
        assert found.cut > 0
    assert audit_examples([example], real_tokenizer, 1).masked == 4


def test_what_is_counted(real_tokenizer):
    """As each sequence is rendered."""
    rows = [
        conversation([ASK, SAY, {"role": "user", "content": "why?"}, SAY]),
        conversation([RULE, ASK, {"role": "assistant", "content": "  four, i.e. 2 + 2 = 4 " * 4}]),
        conversation([{"role": "user", "content": "long " * 40}, SAY]),
    ]
    shown = [render(row, real_tokenizer, 48) for row in rows]
    found = audit_examples(rows, real_tokenizer, 48)
    assert (found.total, found.answers) == (3, 4)
    assert found.longest == max(one.length for one in shown) > 48
    assert found.mean_tokens == pytest.approx(sum(one.length for one in shown) / 3)
    assert found.answer_tokens == sum(len(one.answer_ids) for one in shown)
    assert (found.masked, found.cut) == (2, 3)
    assert found.shifted == 1  # the answer that begins with spaces
    assert found.largest_token == max(token for row in rows for token in render(row, real_tokenizer, None).ids)
    assert audit_examples(rows, real_tokenizer, None).cut == 0


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if loop.index0 % 2 != (m.role == 'assistant') | int %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM_LAST = (  # as Mistral's: in the last question, while there is no answer
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def chat(*turns):
    return conversation(chat_cell([{"role": role, "content": text} for role, text in turns], "messages"))


def test_a_system_message_is_in_the_users_where_the_template_has_no_such_role(real_tokenizer):
    tokenizer = with_template(real_tokenizer, NO_SYSTEM)
    for role in ("system", "developer"):
        audit = audit_examples([chat((role, "Be brief."), ("user", "hi"), ("assistant", "yo"))], tokenizer, None)
        text = render(audit.sequences[0], tokenizer, None).marked(tokenizer)
        assert text == "<user>Be brief.\n\nhi<|im_end|><assistant>⟦yo<|im_end|>⟧"
        assert "the system message begins the first user's in 1 of 1 conversations" in audit.notes[0]


def test_what_a_template_refuses_is_counted_and_shown(real_tokenizer):
    fine, odd = chat(("user", "hi"), ("assistant", "yo")), chat(("user", "one"), ("user", "two"), ("assistant", "yo"))
    with pytest.raises(
        ValueError, match="2 of 3 conversations cannot be rendered, first the one that begins with 'one'"
    ):
        audit_examples([fine, odd, odd], with_template(real_tokenizer, NO_SYSTEM), None)


def test_no_question_is_learned_where_the_template_moves_the_system_message(real_tokenizer):
    tokenizer = with_template(real_tokenizer, SYSTEM_LAST)
    turns = [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "2 + 2?"), ("assistant", "4")]
    audit = audit_examples([chat(*turns)], tokenizer, None)
    found = [render(part, tokenizer, None) for part in audit.sequences]
    learned = [tokenizer.decode(one.ids[start:stop]) for one in found for start, stop in one.spans]
    assert learned == [" 2<|im_end|>", " 4<|im_end|>"]
    assert any("leaves out the system message in 1 of 1" in note for note in audit.notes)


def test_a_thought_that_the_prompt_begins_is_not_missed(real_tokenizer):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    tokenizer = with_template(real_tokenizer, template)
    whole = chat(("user", "hi"), ("assistant", "<think>\nhm\n</think>\nyo"))
    audit = audit_examples([whole], tokenizer, None)
    text = render(whole, tokenizer, None).marked(tokenizer)
    assert text.startswith("<user>hi<|im_end|><assistant><think>")
    assert "⟦" in text.partition("<think>")[2]
    assert not any("drops part" in note for note in audit.notes)
