"""Every form of a chat that docs/chats.md shows is accepted, and learned as it says."""

import json
import re
from pathlib import Path

import pytest

from inlay.data.chats import answer_text, learned_turns
from inlay.data.formats import Rules, convert_records
from inlay.data.preferences import preference_examples

PAGE = (Path(__file__).parents[2] / "docs" / "chats.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
CHATS = [text for text in BLOCKS if "rejected" not in text]
PAIRS = [text for text in BLOCKS if "rejected" in text]
LEARNED = [["4, sorry."], ["time", "It is noon."], ["time", "It is noon."], ["42"], ["4"]]


@pytest.mark.parametrize(("text", "answers"), list(zip(CHATS, LEARNED, strict=True)))
def test_an_example_of_the_page_is_learned(text, answers):
    (example,) = convert_records([json.loads(text)], rules=Rules())
    chat = example["prompt"] + example["completion"]
    learned = [answer_text(chat[i]) for i in learned_turns(example)]
    assert all(answer in found for answer, found in zip(answers, learned, strict=True))
    assert ("tools" in example) == ('"tools"' in text)
    assert ("chat_template_kwargs" in example) == ("kwargs" in text)


@pytest.mark.parametrize("text", PAIRS)
def test_a_pair_of_the_page_is_learned(text):
    (pair,) = preference_examples([json.loads(text)], rules=Rules())
    assert [len(pair[part]) for part in ("prompt", "chosen", "rejected")] == [1, 1, 1]
