"""Preferences: every form of a pair in, one prompt and two answers out."""

import pytest

from inlay.data.preferences import dialogue, preference_examples

ASK = {"role": "user", "content": "Why is the sky blue?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Rayleigh scattering.", "Paint."))
RULE = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
TEXTS = {"chosen": GOOD["content"], "rejected": BAD["content"]}
CHATS = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
SHAREGPT = {name: {"from": "gpt", "value": text} for name, text in TEXTS.items()}
HH = {side: f"\n\nHuman: {ASK['content']}\n\nAssistant: {text}" for side, text in TEXTS.items()}
FORMS = {
    "text": {"prompt": ASK["content"], **TEXTS},
    "question": {"question": ASK["content"], **TEXTS},
    "text and messages": {"prompt": ASK["content"], "chosen": [GOOD], "rejected": [BAD]},
    "text and chats": {"prompt": ASK["content"], **CHATS},
    "text with other whitespace, and chats": {"prompt": " Why  is the sky blue?\n", **CHATS},
    "messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "messages and chats": {"prompt": [ASK], **CHATS},
    "chats": CHATS,
    "ShareGPT": {"conversations": [{"from": "human", "value": ASK["content"]}], **SHAREGPT},
    "HH": HH,
    "HH, with its prompt": {"prompt": f"\n\nHuman: {ASK['content']}\n\nAssistant:", **TEXTS},
    "HH, with the question": {"prompt": ASK["content"], **HH},
    "Alpaca": {"instruction": "Why is", "input": "the sky blue?", **TEXTS},
}


def fault(*records, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller looks at the message
        preference_examples(list(records), {}, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("record", FORMS.values(), ids=FORMS)
def test_the_prompt_is_there_once(record):
    (made,) = preference_examples([record], {})
    texts = [" ".join(message["content"].split()) for message in made["prompt"]]  # some have it with other whitespace
    assert (texts, made | {"prompt": [ASK]}) == ([ASK["content"]], PAIR)


def test_a_prompt_of_several_turns_and_what_stands_beside_it():
    turns = [ASK, GOOD, {"role": "user", "content": "And at dusk?"}]
    beside = {"system": "Be brief.", "tools": [{"name": "look"}], "chat_template_kwargs": {"x": 1}}
    for record in (
        {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]},
        {"prompt": turns, **TEXTS},
        {"prompt": "And at dusk?", "chosen": [*turns, GOOD], "rejected": [*turns, BAD]},
    ):
        (made,) = preference_examples([record | beside], {}, system="not this one", arguments={"x": 2, "y": 3})
        assert (made["prompt"], made["chosen"], made["rejected"]) == ([RULE, *turns], [GOOD], [BAD])
        assert made["tools"] == [{"type": "function", "function": {"name": "look"}}]
        assert made["chat_template_kwargs"] == {"x": 1, "y": 3}
    assert preference_examples([CHATS], {}, system="Be brief.")[0]["prompt"] == [RULE, ASK]


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (TEXTS, "chosen and rejected without a prompt; accepted: two chats, or a prompt column"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "the same answer"),
        ({"prompt": "Why?", **CHATS}, "chosen begins with 'Why is the sky blue?', which is not the prompt 'Why?'"),
        ({"chosen": [ASK, GOOD], "rejected": [RULE, ASK, BAD]}, "differ in message 1, before their last"),
        ({"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, BAD, ASK, BAD]}, "differ in message 2, before"),
        ({"chosen": [ASK, GOOD, ASK], "rejected": [ASK, BAD]}, "chosen ends with a message by user"),
        ({"prompt": "x", "chosen": [], "rejected": "y"}, "chosen is empty"),
        ({"prompt": "x", "chosen": "y", "rejected": None}, "rejected is empty"),
        ({"prompt": "x", "chosen": [GOOD | {"weight": 0}], "rejected": "y"}, "chosen ends with a message by assistant"),
    ],
)
def test_a_faulty_pair_is_named(record, found):
    assert found in fault(record)


def test_a_dialogue_is_no_other_text():
    assert dialogue("Human: hi\n\nAssistant: yo\n\nHuman: and?\n\nAssistant:") == [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "and?"},
    ]  # fmt: skip
    for text in ("hi", "A Human: is\n\nAssistant: not", "Human: hi", "\n\nAssistant: yo\n\nHuman: hi"):
        assert dialogue(text) == []
