"""Training data: records of any common format in, what trl's trainers take out.

A task names its formats and how one record becomes examples. What tasks have in common is here: which column plays
which role, what an empty cell means, and which row is at fault. Whatever is wrong with a user's data is a one-line
ValueError that says where.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from inlay.data.columns import (
    ANSWERS,
    CHATS,
    OPTIONAL,
    Formats,
    Roles,
    Survey,
    Unused,
    as_chat,
    assign_roles,
    check_unused,
    is_empty,
    survey,
)
from inlay.data.json_files import load_json
from inlay.data.records import Record, place_of
from inlay.messages import short

Example = dict[str, Any]
Convert = Callable[[Record, Roles], list[Example]]

# What may stand before the turns of a row, beside them: used by every format that has a prompt or messages.
SYSTEM = {"system": ("system", "system_prompt")}
BEFORE = {**SYSTEM, "history": ("history",)}
# Format -> role -> the columns that can play it, the preferred one first; of the formats the first that fits is taken.
# Recognition, error messages and docs all come from this table.
FORMATS: Formats = {
    "chat": {"messages": ("messages",), **SYSTEM},
    "ShareGPT": {"messages": ("conversations",), **SYSTEM},
    "instruction": {
        "prompt": ("instruction",),
        "input": ("input", "context"),
        "answer": ("output", "response", "answer"),
        **BEFORE,
    },
    "prompt-completion": {
        "prompt": ("prompt",),
        "input": ("input", "context"),
        "answer": ("completion", "response", "answer"),
        **BEFORE,
    },
    "question-answer": {"prompt": ("question",), "input": ("input", "context"), "answer": ("answer",), **BEFORE},
    "query-response": {"prompt": ("query",), "answer": ("response",), **BEFORE},
    "input-output": {"prompt": ("input",), "answer": ("output",), **BEFORE},
    "E2E": {"prompt": ("mr",), "answer": ("ref",), **SYSTEM},
    "text": {"text": ("text",)},
}
SUMMARIES: Formats = {
    "XSum": {"prompt": ("document",), "answer": ("summary",), **SYSTEM},
    "CNN/DailyMail": {"prompt": ("article",), "answer": ("highlights",), **SYSTEM},
    "summary": {"prompt": ("text", "dialogue"), "answer": ("summary",), **SYSTEM},
}
SPEAKERS = {"human": "user", "gpt": "assistant"}
MESSAGE_KEYS = ("role", "from", "content", "value")  # what of a message is used


class EmptyAnswerError(ValueError):
    """A row has nothing to learn from, which a run may say to skip."""


@dataclass
class Findings:
    """What converting records has brought to light, over all sources of a run."""

    unused: Unused = field(default_factory=Unused)
    skipped: int = 0  # rows without an answer
    user_after_user: int = 0  # chats with two messages by the user in a row
    open_end: int = 0  # chats whose last message is no answer

    def add(self, other: Findings) -> None:
        """Count in what was found in another source."""
        self.unused.columns |= other.unused.columns
        self.unused.keys |= other.unused.keys
        self.skipped += other.skipped
        self.user_after_user += other.user_after_user
        self.open_end += other.open_end

    def lines(self) -> list[str]:
        """What a person should read before training."""
        said = {
            str(self.unused): True,
            f"{self.skipped} rows without an answer are skipped": self.skipped,
            f"in {self.user_after_user} rows two messages by the user follow each other": self.user_after_user,
            f"in {self.open_end} rows the last message is no answer, and is not learned": self.open_end,
        }
        return [line for line, holds in said.items() if line and holds]


@dataclass
class Rules:
    """What a run says of its records: roles and their columns, a system message, and what becomes of the rest."""

    columns: Roles = field(default_factory=dict)
    system: str | None = None
    skip_empty: bool = False
    ignore: tuple[str, ...] = ()
    strict: bool = True  # refuse what would change what a row means and is not used; only evaluation does not ask
    source: str = ""
    found: Findings = field(default_factory=Findings)


def convert_records(
    records: list[Record],
    columns: Roles | None = None,
    system: str | None = None,
    formats: Formats = FORMATS,
    rules: Rules | None = None,
) -> list[Example]:
    """Records of one format as trl's conversational prompt and completion, or as {"text": ...} for plain text.

    `columns` maps roles (prompt, input, answer, messages, text) to columns, over the recognised ones; a mapped prompt
    is the whole prompt, unless an input is mapped too. `rules` give both, and have what plays no role refused or
    counted. A chat becomes one example per assistant turn: trl takes the loss over a completion with any chat template,
    but its `assistant_only_loss` needs one with generation markers, which few have. Newlines around an answer are
    dropped: they would merge with the template's own into tokens that the model never sees when it answers.
    """
    given = rules or Rules(columns or {}, system, strict=False)
    return convert_all(records, given, formats, instruction_converter(given.system))


def example_key(example: Example) -> str:
    """A text that two examples share if they are the same."""
    return json.dumps(example, sort_keys=True, default=str)


def instruction_converter(system: str | None) -> Convert:
    """How one record becomes examples of instruction tuning."""

    def convert(record: Record, roles: Roles) -> list[Example]:
        if system is not None and "text" in roles:
            raise ValueError("a system message needs a prompt to stand before; plain text has none")
        return _convert(record, roles, system)

    return convert


class Conversion:
    """Turns records into examples by roles that hold for all of them, and counts what it comes upon.

    Raises:
        ValueError: no format fits the records, or something that matters would not be used.
    """

    def __init__(self, seen: Survey, rules: Rules, formats: Formats, convert: Convert) -> None:
        self.roles = assign_roles(seen, rules.columns, formats)
        self.convert, self.skip_empty, self.found = convert, rules.skip_empty, Findings()
        if rules.strict:
            self.found.unused = check_unused(seen, self.roles, MESSAGE_KEYS, rules.ignore)

    def __call__(self, record: Record) -> list[Example]:
        """The examples of one record; of one without an answer, none where such rows are skipped."""
        try:
            cells = self._cells(record)
            _check_answered(cells, self.roles)
        except EmptyAnswerError:
            if not self.skip_empty:
                raise
            self.found.skipped += 1
            return []
        for role in ("messages", "prompt"):
            if isinstance(chat := cells.get(self.roles.get(role, "")), list):
                self._look_at(chat, role)
        return self.convert(cells, self.roles)

    def _cells(self, record: Record) -> Record:
        """The cells that play a role, by column: None for an empty one, and chats read from JSON."""
        cells: Record = {}
        for role, column in self.roles.items():
            if column not in record and role not in OPTIONAL and not (role == "prompt" and "chosen" in self.roles):
                kind = EmptyAnswerError if role in (*ANSWERS, "messages") else ValueError
                raise kind(f"no column {column!r} as in other rows, but {short(', '.join(record))}")
            cell = record.get(column)
            cells[column] = None if is_empty(cell) else (as_chat(cell) or cell) if role in CHATS else cell
        return cells

    def _look_at(self, chat: list[Any], role: str) -> None:
        speakers = [_speaker(message) for message in chat if isinstance(message, dict)]
        self.found.user_after_user += ("user", "user") in pairwise(speakers)
        self.found.open_end += role == "messages" and speakers[-1:] == ["user"]


def _speaker(message: dict[str, Any]) -> Any:
    speaker = message.get("role", message.get("from"))
    return SPEAKERS.get(str(speaker), speaker)


def _check_answered(cells: Record, roles: Roles) -> None:
    """Raise an EmptyAnswerError for a row that has nothing to learn from."""
    for role in ANSWERS:
        if role in roles and cells[roles[role]] is None:
            raise EmptyAnswerError(f"{roles[role]} is empty; accepted: text")
    chat = cells.get(roles.get("messages", ""), "")
    if chat is None:
        raise EmptyAnswerError("no assistant message; accepted: at least one to learn from")
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        return
    said = [place for place, message in enumerate(chat, start=1) if _speaker(message) == "assistant"]
    if said and all(_says_nothing(chat[place - 1]) for place in said):
        raise EmptyAnswerError(f"message {said[-1]} is empty; accepted: text")
    if not said and all(_speaker(message) in ("system", "user") for message in chat):
        raise EmptyAnswerError("no assistant message; accepted: at least one to learn from")


def _says_nothing(message: dict[str, Any]) -> bool:
    return all(is_empty(value) for key, value in message.items() if key not in ("role", "from", "name"))


class Faults:
    """Rows that cannot be converted: the first two, and how many there are."""

    def __init__(self, rules: Rules) -> None:
        self.said: list[str] = []
        self.strict = rules.strict
        self.count = self.empty = 0

    def attempt(self, conversion: Conversion, record: Record, place: Callable[[], str]) -> list[Example]:
        """The examples of a record; none, and one fault more, where it has one."""
        try:
            return conversion(record)
        except ValueError as error:
            self.count += 1
            self.empty += isinstance(error, EmptyAnswerError)
            if len(self.said) < 2:
                self.said.append(f"{place()}: {error}")
            return []

    def check(self) -> None:
        """Raise a ValueError if there were any; for a run, with how it can pass over some of them."""
        if not self.count:
            return
        more = f" ({self.count} rows at fault, next {self.said[1]})" if self.count > 1 else ""
        hint = (
            f"; --empty-answers skip leaves out the {self.empty} without an answer"
            if self.empty and self.strict
            else ""
        )
        raise ValueError(self.said[0] + more + hint)


def convert_all(records: list[Record], rules: Rules, formats: Formats, convert: Convert) -> list[Example]:
    """Records of one of some formats, each by `convert`, which also gets role -> column.

    Raises:
        ValueError: there are none, no format fits them, or rows are at fault: the first two, and how many.
    """
    if not records:
        raise ValueError("found no records; accepted: at least one")
    conversion, faults = Conversion(survey(records), rules, formats, convert), Faults(rules)
    examples: list[Example] = []
    for i, record in enumerate(records):
        examples += faults.attempt(conversion, record, lambda i=i: place_of(records, i))
    faults.check()
    if not examples:
        raise ValueError(f"none of {len(records)} rows has an answer; accepted: at least one")
    rules.found.add(conversion.found)
    return examples


def _convert(record: Record, roles: Roles, system: str | None) -> list[Example]:
    cells = {role: record.get(column) for role, column in roles.items()}
    if "text" in roles:
        return [{"text": text_cell(cells["text"], roles["text"])}]
    if "messages" in roles:
        chat = chat_cell(cells["messages"], roles["messages"])
        return chat_turns(chat, system_of(record, roles, system, chat))
    prompt, answer, earlier = cells["prompt"], cells["answer"], earlier_turns(record, roles)
    system = system_of(record, roles, system)
    if isinstance(prompt, list):  # trl's own form: the turns so far, and the next
        tail = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return chat_turns(earlier + chat_cell(prompt + tail, roles["prompt"]), system)[-1:]
    question = question_of(record, roles)
    answer = text_cell(answer, roles["answer"])
    return chat_turns(
        [*earlier, {"role": "user", "content": question}, {"role": "assistant", "content": answer}], system
    )


def question_of(record: Record, roles: Roles) -> str:
    """The prompt of a record, with its input below where it has one."""
    question = text_cell(record[roles["prompt"]], roles["prompt"])
    extra = record.get(roles.get("input", ""))
    return question if extra is None else question + "\n\n" + text_cell(extra, roles["input"])


def system_of(record: Record, roles: Roles, system: str | None, chat: list[dict[str, Any]] | None = None) -> str | None:
    """The system message of a record: that of its own column, else the run's.

    Raises:
        ValueError: the column says one thing, and the chat's own system message another.
    """
    own = record.get(roles.get("system", ""))
    if own is None:
        return system
    own = text_cell(own, roles["system"])
    if chat and chat[0]["role"] == "system" and chat[0]["content"] != own:
        raise ValueError(f"{roles['system']} is {short(own)}, but message 1 is another system message; accepted: one")
    return own


def earlier_turns(record: Record, roles: Roles) -> list[dict[str, Any]]:
    """The turns that a record's history holds: pairs of a question and its answer, or messages."""
    name = roles.get("history", "")
    history = record.get(name)
    if isinstance(history, str):
        with suppress(ValueError):
            history = load_json(history)
    if history is None:
        return []
    if (chat := as_chat(history)) is not None:
        return chat_cell(chat, name)
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise ValueError(f"{name} is {short(history)}; accepted: a list of [question, answer]")
    speakers = ("user", "assistant")
    return [
        {"role": role, "content": text_cell(cell, name)}
        for pair in history
        for role, cell in zip(speakers, pair, strict=True)
    ]


def text_cell(cell: Any, name: str) -> str:
    """A cell that has to be text, or what has only one way to be written as text: a whole number, a date.

    Raises:
        ValueError: it is neither; the message says what it is.
    """
    if isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], str):
        cell = cell[0]  # as of data sets that list all answers that count as right
    if isinstance(cell, (int, decimal.Decimal, datetime.date, datetime.time)) and not isinstance(cell, bool):
        return str(cell)
    if isinstance(cell, str) and not is_empty(cell):
        if any("\ud800" <= c <= "\udfff" for c in cell):  # JSON can write it, no tokenizer reads it
            raise ValueError(f"{name} is {short(cell)}, with half of a surrogate pair; accepted: text")
        return cell
    found = "empty" if is_empty(cell) else f"the {type(cell).__name__} {short(cell)}"
    raise ValueError(f"{name} is {found}; accepted: text")


def chat_cell(cell: Any, name: str) -> list[dict[str, str]]:
    """A cell that has to be a chat, OpenAI's or ShareGPT's, as {"role", "content"}; else a ValueError."""
    if not isinstance(cell, list) or not all(isinstance(turn, dict) for turn in cell):
        raise ValueError(f"{name!r} is {short(cell)}; accepted: a list of messages")
    made: list[dict[str, str]] = []
    for place, turn in enumerate(cell, start=1):
        speaker = turn.get("role", turn.get("from"))
        role = SPEAKERS.get(str(speaker), speaker)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {place} is by {speaker!r}; accepted: system, user, assistant, human, gpt")
        before = made[-1]["role"] if made else None
        if (role == "system" and before) or (role == "assistant" and before != "user"):
            wanted = "system only as the first, assistant after user"
            raise ValueError(f"message {place} is by {role}, after {before or 'none'}; accepted: {wanted}")
        content = text_cell(turn.get("content", turn.get("value")), f"message {place}")
        made.append({"role": role, "content": content})
    return made


def chat_turns(chat: list[dict[str, str]], system: str | None) -> list[Example]:
    """A chat as one prompt and completion for each of the assistant's turns."""
    if system is not None and chat and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system}, *chat]
    chat = [m | {"content": m["content"].strip("\r\n")} if m["role"] == "assistant" else m for m in chat]
    ends = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    if not ends:
        raise ValueError("no assistant message; accepted: at least one to learn from")
    return [{"prompt": chat[:i], "completion": [chat[i]]} for i in ends]


Row = dict[str, Any]
