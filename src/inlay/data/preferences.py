"""Preference records: a prompt and two answers, of which one is chosen, in the forms that data sets have them."""

from __future__ import annotations

import re
from typing import Any

from inlay.data.chats import (
    Example,
    Message,
    chat_cell,
    is_learned,
    template_arguments,
    text_cell,
    tools_cell,
    with_system,
)
from inlay.data.formats import BESIDE, CHAT, Convert, Rules, convert_all, earlier_turns, question_of
from inlay.data.records import Record
from inlay.messages import short

SIDES = ("chosen", "rejected")
PREFERENCE_FORMATS = {
    "preference": {
        "prompt": ("prompt", "question", "instruction", "conversations"),
        "input": ("input",),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        **BESIDE,
    },
    "chats": {"chosen": ("chosen",), "rejected": ("rejected",), **CHAT},
}


def preference_examples(
    records: list[Record],
    columns: dict[str, str] | None = None,
    system: str | None = None,
    arguments: dict[str, Any] | None = None,
    rules: Rules | None = None,
) -> list[Example]:
    """Return records as {"prompt", "chosen", "rejected"}: the messages that both sides share, and the answer of each.

    A side is text, a message, or a whole chat; a prompt that the chats repeat is there once. Without a prompt column
    it is what the chats share. Text may be a dialogue in the form of Anthropic's HH (see `dialogue`).
    """
    given = rules or Rules(columns or {}, system, arguments=arguments or {}, strict=False)
    return convert_all(records, given, PREFERENCE_FORMATS, pair_converter(given))


def pair_converter(rules: Rules) -> Convert:
    """Return how one record becomes a prompt and two answers."""

    def convert(record: Record, roles: dict[str, str]) -> list[Example]:
        cells = {role: record.get(column) for role, column in roles.items()}
        prompt, sides = prompt_and_sides(cells, roles)
        chats = [with_system(whole_chat(prompt, side, name), cells.get("system"), "system")
                 for side, name in zip(sides, SIDES, strict=True)]  # fmt: skip
        if rules.system is not None and chats[0][0]["role"] not in ("system", "developer"):
            chats = [[{"role": "system", "content": rules.system}, *chat] for chat in chats]
        example = shared_prompt(*chats)
        own = template_arguments(cells.get("chat_template_kwargs"), "chat_template_kwargs")
        tools, about = tools_cell(cells.get("tools"), "tools"), {**rules.arguments, **own}
        return [example | ({"tools": tools} if tools else {}) | ({"chat_template_kwargs": about} if about else {})]

    return convert


def prompt_and_sides(cells: dict[str, Any], roles: dict[str, str]) -> tuple[list[Message], list[list[Message]]]:
    """Return the prompt and both sides of a record as messages; the prompt is empty where it has no column."""
    prompt, column = cells.get("prompt"), roles.get("prompt", "prompt")
    sides = [side_messages(cells[side], side) for side in SIDES]
    if prompt is None and (
        (not cells.get("history") and all(len(side) > 1 for side in sides)) or "prompt" not in roles
    ):
        if any(side[0]["role"] == "assistant" for side in sides):
            raise ValueError("chosen and rejected without a prompt; accepted: two chats, or a prompt column")
        return [], sides
    earlier = earlier_turns(cells, roles)
    if isinstance(prompt, list):
        return [*earlier, *chat_cell(prompt, column)], sides
    text = question_of(cells, roles)
    return [*earlier, *(dialogue(text) or [{"role": "user", "content": text}])], sides


def side_messages(cell: Any, name: str) -> list[Message]:
    """Return one side of a record as messages."""
    if isinstance(cell, dict):
        cell = [cell]
    if isinstance(cell, list):
        if not cell:
            raise ValueError(f"{name} is empty; accepted: text or a chat")
        return chat_cell(cell, name)
    text = text_cell(cell, name)
    return dialogue(text) or [{"role": "assistant", "content": text.strip("\r\n")}]


def dialogue(text: str) -> list[Message]:
    """Return the turns of a text in the form of Anthropic's HH; none where `text` has another form.

    "Human:" and "Assistant:" begin paragraphs there. The last turn may wait for its answer.
    """
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip())
    if parts[0].strip() or len(parts) < 3 or parts[1] != "Human" or "Assistant" not in parts[1::2]:
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    return turns[:-1] if not turns[-1]["content"] else turns


def whole_chat(prompt: list[Message], side: list[Message], name: str) -> list[Message]:
    """Return a side with its prompt before it, unless it is a chat that has it already.

    Raises:
        ValueError: it is a chat with other questions.
    """
    if not prompt or alike(side[: len(prompt)], prompt):
        return side
    if side[0]["role"] == "assistant":
        return [*prompt, *side]
    bare = [m for m in side if m["role"] not in ("system", "developer")]
    if alike(bare[: len(prompt)], prompt) or (len(prompt) == 1 and any(alike([m], prompt) for m in side)):
        return side
    raise ValueError(
        f"{name} begins with {short(side[0]['content'])}, which is not the prompt {short(prompt[0]['content'])}; "
        "accepted: an answer, or a chat that begins with the prompt"
    )


def alike(first: list[Message], second: list[Message]) -> bool:
    """Return whether two chats say the same, but for whitespace."""
    texts = [[(m["role"], m["content"].split(), m.get("tool_calls")) for m in chat] for chat in (first, second)]
    return texts[0] == texts[1]


def shared_prompt(chosen: list[Message], rejected: list[Message]) -> Example:
    """Return two chats as their prompt and two answers.

    Raises:
        ValueError: they differ before their last message, not at all, or do not end with an answer.
    """
    for name, chat in zip(SIDES, (chosen, rejected), strict=True):
        if not is_learned(chat[-1]):
            raise ValueError(f"{name} ends with a message by {chat[-1]['role']}; accepted: one by assistant")
        if "weight" in chat[-1]:
            raise ValueError(f"{name} has an answer of weight {chat[-1]['weight']:g}; a pair has none, leave it out")
    prompts = chosen[:-1], rejected[:-1]
    if not alike(*prompts):
        pairs = zip(*prompts, strict=False)
        place = next((i for i, pair in enumerate(pairs) if not alike(*([m] for m in pair))), min(map(len, prompts)))
        raise ValueError(f"chosen and rejected differ in message {place + 1}, before their last; accepted: one prompt")
    if not prompts[0] or alike(chosen[-1:], rejected[-1:]):
        raise ValueError("chosen and rejected are the same answer" if prompts[0] else "there is no prompt")
    return {"prompt": prompts[0], "chosen": chosen[-1:], "rejected": rejected[-1:]}
