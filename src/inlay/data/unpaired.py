"""Unpaired preferences: a prompt, one answer, and whether it is desirable; pairs give one of each kind."""

from __future__ import annotations

from inlay.data.chats import Example, is_learned
from inlay.data.formats import BESIDE, CHAT, Rules, convert_all, instruction_converter
from inlay.data.labelled import label_text
from inlay.data.preferences import PREFERENCE_FORMATS, SIDES, pair_converter
from inlay.data.records import Record
from inlay.messages import short

VERDICT = ("label", "desirable", "is_correct", "accepted", "approved")
UNPAIRED_FORMATS = {
    "unpaired": {
        "prompt": ("prompt", "question", "instruction"),
        "input": ("input",),
        "answer": ("completion", "response", "answer", "output"),
        "label": VERDICT,
        **BESIDE,
    },
    "labelled chat": {"messages": ("messages", "conversations"), "label": VERDICT, **CHAT},
    **PREFERENCE_FORMATS,
}


def unpaired_examples(records: list[Record], rules: Rules) -> list[Example]:
    """Return records as {"prompt", "completion", "label"}: a conversation, its last answer, whether it is desirable.

    Of a pair the chosen answer is desirable, and the rejected one is not.
    """
    of_pair, of_answer = pair_converter(rules), instruction_converter(rules)

    def convert(record: Record, roles: dict[str, str]) -> list[Example]:
        if "chosen" in roles:
            (pair,) = of_pair(record, roles)
            about = {key: value for key, value in pair.items() if key not in ("prompt", *SIDES)}
            return [
                {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen", **about}
                for side in SIDES
            ]
        (example,) = of_answer(record, roles)
        chat = example["prompt"] + example["completion"]
        if not is_learned(chat[-1]) or "weight" in chat[-1]:
            raise ValueError(
                f"the chat ends with a message by {chat[-1]['role']}; accepted: an answer without a weight"
            )
        return [
            {**example, "prompt": chat[:-1], "completion": chat[-1:], "label": is_desirable(record, roles["label"])}
        ]

    return convert_all(records, rules, UNPAIRED_FORMATS, convert)


def is_desirable(record: Record, column: str) -> bool:
    """Return whether an answer is desirable.

    Raises:
        ValueError: its label says neither.
    """
    known = {"True": True, "1": True, "False": False, "0": False}
    label = label_text(record[column], column)
    if label not in known:
        raise ValueError(f"{column} is {short(record[column])}; accepted: true or false, 1 or 0")
    return known[label]
