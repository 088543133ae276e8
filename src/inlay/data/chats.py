"""Chats as records hold them, in OpenAI's form, ShareGPT's or trl's, made into conversations to learn from.

A conversation is an example {"prompt", "completion"}: its messages up to the first answer that is learned, and from
there on. Beside them it may have "tools" and "chat_template_kwargs", which its chat template gets. A message is what
the chat template gets too, but for "weight": 0, which marks an answer that is context and is not learned.
"""

from __future__ import annotations

import datetime
import decimal
import inspect
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.data.columns import is_empty
from inlay.data.json_files import load_json
from inlay.messages import short

Message = dict[str, Any]
Example = dict[str, Any]

ROLES = {  # as records name them: OpenAI, ShareGPT, LLaMA-Factory, Llama 3, Gemma
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "function_response", "tool_response"), "tool"),
}
CALLERS = ("function_call", "tool_call")  # ShareGPT's speakers whose text is a call
SWITCHES = ("weight", "train", "trainable", "training", "loss")  # whether an answer is learned
NUMBERS = ("weight", "loss")  # those of them that may say how much it counts
MOST_WEIGHT = 1000
UNKNOWN_SWITCHES = ("label", "train_detail", "training_detail", "mask", "loss_mask", "loss_weight")
TEXT_PARTS = (None, "text", "input_text", "output_text")
# What `apply_chat_template` takes itself cannot be handed to the template.
OWN_ARGUMENTS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"documents"}


class EmptyAnswerError(ValueError):
    """Say that a row has nothing to learn from; a run may skip such rows."""


def text_cell(cell: Any, name: str) -> str:
    """Return a cell that has to be text, or what has only one way to be written as text: a whole number, a date.

    Raises:
        ValueError: it is neither; the message says what it is.
    """
    if isinstance(cell, dict) and cell.keys() == {"text", "answer_start"}:
        cell = cell["text"]  # SQuAD's, with the place in the context where it was found
    if isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], str):
        cell = cell[0]  # as of data sets that list all answers that count as right
    if isinstance(cell, (int, decimal.Decimal, datetime.date, datetime.time)) and not isinstance(cell, bool):
        return str(cell)
    if isinstance(cell, str) and not is_empty(cell):
        return whole_characters(cell, name)
    found = "empty" if is_empty(cell) else f"the {type(cell).__name__} {short(cell)}"
    raise ValueError(f"{name} is {found}; accepted: text")


def whole_characters(text: str, name: str) -> str:
    """Return the text, unless it holds half of a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {short(text)}, with half of a surrogate pair; accepted: text") from None
    return text


def chat_cell(cell: Any, name: str) -> list[Message]:
    """Return the messages of a cell that has to be a chat, each with a known role; raise a ValueError otherwise."""
    cell = parsed(cell)
    if not isinstance(cell, list) or not all(isinstance(turn, dict) for turn in cell):
        advice = ", or such a list as JSON (json.dumps writes it)" if isinstance(cell, str) else ""
        raise ValueError(f"{name!r} is {short(cell)}; accepted: a list of messages{advice}")
    chat: list[Message] = []
    for place, turn in enumerate(cell, start=1):
        message = read_message(turn, place)
        if chat and chat[-1]["role"] == message["role"] == "assistant":
            chat[-1] = with_calls(chat[-1], message, place)
        else:
            chat.append(message)
    return chat


def parsed(cell: Any) -> Any:
    """Return a list or a mapping that a column of text holds as JSON; any other cell as it is."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        try:
            return load_json(cell)
        except ValueError:
            return cell
    return cell


def read_message(turn: dict[str, Any], place: int) -> Message:
    """Return one message of a record, with its content as text and its calls as OpenAI has them.

    Raises:
        ValueError: its speaker is unknown, it is empty, or it holds what is no text and no call.
    """
    said = {key: value for key, value in turn.items() if value is not None}  # a column of all rows is null in some
    speaker, role = said.get("role") or said.get("from"), role_of(said)
    if speaker is None:
        raise ValueError(
            f"message {place} has {', '.join(map(short, turn)) or 'nothing'}; accepted: role and content, or from and "
            "value"
        )
    if role is None:
        raise ValueError(f"message {place} is by {speaker!r}; accepted: {', '.join(ROLES)}")
    content = said.get("content", said.get("value"))
    more = {key: value for key, value in said.items() if key not in ("role", "from", "content", "value")}
    weight = weight_of_message(more, place, role)
    message: Message = {"role": role, "content": content_of(content, role, f"message {place}")}
    if str(speaker).strip().lower() in CALLERS:
        message |= {"content": "", "tool_calls": read_calls(content, place)}
    elif calls := more.pop("tool_calls", None) or more.pop("function_call", None):
        message["tool_calls"] = read_calls(calls, place)
    if is_empty(message["content"]) and role in ("user", "assistant") and "tool_calls" not in message:
        kind = EmptyAnswerError if role == "assistant" else ValueError
        raise kind(f"message {place} is empty; accepted: text")
    if role == "assistant":  # newlines around an answer would merge with the template's own
        message["content"] = message["content"].strip("\r\n")
    return message | more | ({} if weight == 1 else {"weight": weight})


def role_of(turn: dict[str, Any]) -> str | None:
    """Return whose message it is, of the roles that chat templates know; None where it names none of them."""
    speaker = turn.get("role") or turn.get("from")
    return ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None


def weight_of_message(more: dict[str, Any], place: int, role: str) -> float:
    """Return how much a message counts (0: it is not learned); take the keys that say so out of `more`.

    Raises:
        ValueError: a key is no switch, two say different things, or what is not the assistant's is to be learned.
    """
    if unknown := [key for key in UNKNOWN_SWITCHES if key in more]:
        raise ValueError(
            f"message {place} has {unknown[0]!r}, which is not handled; leave it out, or give weight: 0 for an answer "
            "that is not to be learned"
        )
    switches = {key: more.pop(key) for key in SWITCHES if key in more}
    for key, value in switches.items():
        number = isinstance(value, int | float) and 0 <= value <= MOST_WEIGHT
        if not number or (key not in NUMBERS and value not in (0, 1)):
            wanted = f"a number from 0 to {MOST_WEIGHT}" if key in NUMBERS else "0 or 1, false or true"
            raise ValueError(f"message {place}: {key} is {short(value)}; accepted: {wanted}")
        if value and role != "assistant":
            raise ValueError(f"message {place} is by {role}, with {key}: {value}; only the assistant's are learned")
    if len(set(map(float, switches.values()))) > 1:
        raise ValueError(f"message {place}: {' and '.join(switches)} say different things; give one of them")
    weight = float(next(iter(switches.values()), 1))
    return weight or 0


def content_of(content: Any, role: str, name: str) -> str:
    """Return the text of a message, whose content may be a list of parts; a tool's answer may be any JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return whole_characters(content, name)
    if isinstance(content, list) and content and all(isinstance(part, str | dict) for part in content):
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        if all(part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str) for part in parts):
            return whole_characters("".join(part["text"] for part in parts), name)
        if role != "tool":
            strange = next((p for p in parts if p.get("type") not in TEXT_PARTS), parts[0]).get("type")
            raise ValueError(f"{name} has a part of type {strange!r}; accepted: text (images are for task vision)")
    if role == "tool" and isinstance(content, dict | list):
        return json.dumps(content, ensure_ascii=False)
    raise ValueError(f"{name} is the {type(content).__name__} {short(content)}; accepted: text")


def read_calls(cell: Any, place: int) -> list[dict[str, Any]]:
    """Return the calls of a message, as {"type": "function", "function": {"name", "arguments": a mapping}}."""
    cell = parsed(cell)
    made = []
    for call in cell if isinstance(cell, list) else [cell]:
        function = parsed(call.get("function", call)) if isinstance(call, dict) else None
        arguments: Any = None
        if isinstance(function, dict):
            arguments = function.get("arguments", function.get("parameters", {}))
            # Text keeps its nulls; in a mapping, those of Parquet stand for keys that other rows have.
            arguments = parsed(arguments) if isinstance(arguments, str) else without_null(arguments)
        if not isinstance(function, dict) or not function.get("name") or not isinstance(arguments or {}, dict):
            wanted = '{"name": ..., "arguments": {...}}'
            raise ValueError(f"message {place}: the call {short(call)} cannot be read; accepted: {wanted}")
        about = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
        made.append(about | {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}})
    return made


def with_calls(first: Message, second: Message, place: int) -> Message:
    """Return two messages of the assistant as one, where the second is its calls.

    Raises:
        ValueError: the second is text, or only one of them is learned.
    """
    if "tool_calls" not in second or second["content"] or first.get("weight") != second.get("weight"):
        raise ValueError(f"message {place} is by assistant, after assistant; accepted: assistant after user or tool")
    return first | {"tool_calls": [*first.get("tool_calls", []), *second["tool_calls"]]}


def tools_cell(cell: Any, name: str) -> list[dict[str, Any]] | None:
    """Return the tool definitions of a cell, as JSON schemas in OpenAI's form; None where it is empty."""
    found = parsed(cell)
    if found is None or found in ("", [], {}):
        return None
    made = []
    for tool in found if isinstance(found, list) else [found]:
        tool = parsed(tool)
        if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
            tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        if not isinstance(tool, dict) or "function" not in tool:
            raise ValueError(f"{name} holds {short(tool)}; accepted: a list of tools as JSON schemas")
        made.append(without_null(tool))
    return made


def without_null(value: Any) -> Any:
    """Return a value without the keys that are null, at any depth: Parquet has the keys of all rows in each."""
    if isinstance(value, dict):
        return {key: without_null(inner) for key, inner in value.items() if inner is not None}
    return list(map(without_null, value)) if isinstance(value, list) else value


def template_arguments(cell: Any, name: str) -> dict[str, Any]:
    """Return what a chat template gets beside the messages, from a cell or a recipe."""
    found = parsed(cell)
    if found is None or found == "":
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {short(found)}; accepted: a mapping, such as {{enable_thinking: false}}")
    if own := sorted(OWN_ARGUMENTS & found.keys()):
        raise ValueError(f"{name}: {own[0]} is not the chat template's to know; leave it out")
    return {key: value for key, value in found.items() if value is not None}


def conversation(
    chat: list[Message],
    system: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    arguments: dict[str, Any] | None = None,
    last: bool = False,
) -> Example:
    """Return a chat as an example, with `system` in front unless it has a system message of its own.

    With `last`, only the last of its answers is learned. Answers to nothing are context.

    Raises:
        ValueError: no answer is left to learn.
    """
    if system is not None and not (chat and chat[0]["role"] in ("system", "developer")):
        chat = [{"role": "system", "content": system}, *chat]
    if chat and chat[0]["role"] == "system" and "tools" in chat[0]:
        tools = tools or tools_cell(chat[0]["tools"], "tools")
        chat = [{key: value for key, value in chat[0].items() if key != "tools"}, *chat[1:]]
    asked = next((i for i, message in enumerate(chat) if message["role"] in ("user", "tool")), len(chat))
    ends = [i for i in range(asked, len(chat)) if is_learned(chat[i])]
    if not ends:
        raise EmptyAnswerError("no assistant message; accepted: at least one to learn from, after a user's")
    first = ends[-1] if last else ends[0]
    example: Example = {"prompt": chat[:first], "completion": chat[first:]}
    example |= {"tools": tools} if tools else {}
    return example | ({"chat_template_kwargs": arguments} if arguments else {})


def is_learned(message: Message) -> bool:
    """Return whether a message is an answer to learn."""
    return message["role"] == "assistant" and message.get("weight") != 0


def with_system(chat: list[Message], cell: Any, name: str) -> list[Message]:
    """Return a chat with the system message of a record's own column in front.

    Raises:
        ValueError: the chat has another one.
    """
    if cell is None or cell == "":
        return chat
    message = {"role": "system", "content": text_cell(cell, name)}
    if chat and chat[0]["role"] == "system" and chat[0]["content"].strip() != message["content"].strip():
        raise ValueError(f"{name} is {short(cell)}, and message 1 is another system message; accepted: one of them")
    return [message, *(chat[1:] if chat and chat[0]["role"] == "system" else chat)]


def learned_turns(example: Example) -> list[int]:
    """Return the places, among all messages of a conversation, of the answers that are learned."""
    first = len(example["prompt"])
    return [first + i for i, message in enumerate(example["completion"]) if is_learned(message)]


def turn_by_turn(example: Example) -> list[Example]:
    """Return a conversation as one example for each of its answers, which ends with it."""
    chat = example["prompt"] + example["completion"]
    about = {key: value for key, value in example.items() if key not in ("prompt", "completion")}
    return [{"prompt": chat[:i], "completion": [chat[i]], **about} for i in learned_turns(example)]


def answer_text(message: Message) -> str:
    """Return what an answer says, for people: its text and its calls."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join(filter(None, [message["content"], *calls]))
