"""Prompts, some with a reference answer, for models that answer themselves and are rewarded."""

from __future__ import annotations

from inlay.data.chats import Example, answer_text
from inlay.data.formats import BESIDE, FORMATS, Rules, convert_all, instruction_converter
from inlay.data.records import Record

NO_ANSWER = ""  # the name of a column that no record has
PROMPT_FORMATS = {
    **{name: roles for name, roles in FORMATS.items() if name != "text"},
    "prompt": {"prompt": ("prompt", "question", "instruction", "query", "problem"), "input": ("input",), **BESIDE},
}


def prompt_examples(records: list[Record], rules: Rules) -> list[Example]:
    """Return records as {"prompt", "answer"}: a conversation up to its last answer, and this, if any."""
    convert = instruction_converter(rules)

    def prompt(record: Record, roles: dict[str, str]) -> list[Example]:
        alone = not {"answer", "messages"} & roles.keys()
        if alone:
            record, roles = {**record, NO_ANSWER: "."}, {**roles, "answer": NO_ANSWER}
        (example,) = convert(record, roles)
        chat = example["prompt"] + example["completion"]
        about = {key: value for key, value in example.items() if key != "completion"}
        return [{**about, "prompt": chat[:-1], "answer": None if alone else answer_text(chat[-1])}]

    return convert_all(records, rules, PROMPT_FORMATS, prompt)
