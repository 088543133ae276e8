"""Training data: records of any common format in, what trl's trainers take out.

A task names its formats and how one record becomes examples. What tasks have in common is here: which column plays
which role, what an empty cell means, and which row is at fault. Whatever is wrong with a user's data is a one-line
ValueError that says where.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inlay.data.chats import (
    SWITCHES,
    EmptyAnswerError,
    Example,
    Message,
    chat_cell,
    conversation,
    parsed,
    role_of,
    template_arguments,
    text_cell,
    tools_cell,
    with_system,
)
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
    words_for_nothing,
)
from inlay.data.records import Record, place_of
from inlay.messages import short

Convert = Callable[[Record, Roles], list[Example]]

# What a row may have beside its prompt and answer, or its messages, in every format that has these.
CHAT: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt", "system_message"),
    "tools": ("tools", "functions", "available_tools"),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
BESIDE = {**CHAT, "history": ("history", "chat_history", "conversation_history")}
# Of messages; what becomes of the other keys, the audit says.
USED_KEYS = (*SWITCHES, "tool_calls", "function_call", "tools")
# Format -> role -> the columns that can play it, the preferred one first; of the formats the first that fits is taken.
# Recognition, error messages and docs all come from this table.
FORMATS: Formats = {
    "chat": {"messages": ("messages",), **CHAT},
    "ShareGPT": {"messages": ("conversations",), **CHAT},
    "instruction": {
        "prompt": ("instruction",),
        "input": ("input", "context"),
        "answer": ("output", "response", "answer"),
        **BESIDE,
    },
    "prompt-completion": {
        "prompt": ("prompt",),
        "input": ("input", "context"),
        "answer": ("completion", "response", "answer"),
        **BESIDE,
    },
    "question-answer": {
        "prompt": ("question",),
        "input": ("input", "context"),
        "answer": ("answer", "answers", "response"),
        **BESIDE,
    },
    "query-response": {"prompt": ("query",), "answer": ("response",), **BESIDE},
    "input-output": {"prompt": ("input",), "answer": ("output",), **BESIDE},
    "E2E": {"prompt": ("mr",), "answer": ("ref",), **CHAT},
    "text": {"text": ("text",)},
}
SUMMARIES: Formats = {
    "XSum": {"prompt": ("document",), "answer": ("summary",), **CHAT},
    "CNN/DailyMail": {"prompt": ("article",), "answer": ("highlights",), **CHAT},
    "summary": {"prompt": ("text", "dialogue"), "answer": ("summary",), **CHAT},
}


@dataclass
class Findings:
    """Collect what converting records has brought to light, over all sources of a run."""

    unused: Unused = field(default_factory=Unused)
    skipped: int = 0  # rows without an answer
    nothings: list[str] = field(default_factory=list)  # lines on words such as NA

    def add(self, other: Findings) -> None:
        """Count in what was found in another source."""
        self.unused.columns |= other.unused.columns
        self.skipped += other.skipped
        self.nothings += other.nothings

    def lines(self) -> list[str]:
        """Return what a person should read before training."""
        said = {
            str(self.unused): True,
            f"rows without an answer, skipped: {self.skipped}": self.skipped,
        }
        return [*(line for line, holds in said.items() if line and holds), *dict.fromkeys(self.nothings)]


@dataclass
class Rules:
    """Hold what a run says of its records: roles and columns, a system message, and what becomes of the rest."""

    columns: Roles = field(default_factory=dict)
    system: str | None = None
    skip_empty: bool = False
    ignore: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)  # of the chat template, below a record's own
    last: bool = False  # of a conversation's answers only the last is learned
    unlabelled: str = "-1"  # the label that stands for none
    strict: bool = True  # refuse what would change what a row means and is not used; only evaluation does not ask
    source: str = ""
    found: Findings = field(default_factory=Findings)


def convert_records(
    records: list[Record],
    columns: Roles | None = None,
    system: str | None = None,
    formats: Formats = FORMATS,
    rules: Rules | None = None,
    arguments: dict[str, Any] | None = None,
    last: bool = False,
) -> list[Example]:
    """Return records of one format as conversations (see `chats`), or as {"text": ...} for plain text.

    `columns` maps roles (prompt, input, answer, messages, text) to columns, over the recognised ones; a mapped prompt
    is the whole prompt, unless an input is mapped too. `arguments` are the chat template's, below a record's own;
    `last`: of a conversation's answers only the last is learned. `rules` say all of that for a run, and have what plays
    no role refused or counted.
    """
    given = rules or Rules(columns or {}, system, arguments=arguments or {}, last=last, strict=False)
    return convert_all(records, given, formats, instruction_converter(given))


def example_key(example: Example) -> str:
    """Return a text that two examples share if they are the same."""
    return json.dumps(example, sort_keys=True, default=str)


def instruction_converter(rules: Rules) -> Convert:
    """Return how one record becomes a conversation to learn from, or plain text."""

    def convert(record: Record, roles: Roles) -> list[Example]:
        if rules.system is not None and "text" in roles:
            raise ValueError("a system message needs a prompt to stand before; plain text has none")
        return [_convert(record, roles, rules)]

    return convert


class Conversion:
    """Turn records into examples by roles that hold for all of them, and count what is found.

    Raises:
        ValueError: no format fits the records, or something that matters would not be used.
    """

    def __init__(self, seen: Survey, rules: Rules, formats: Formats, convert: Convert) -> None:
        self.roles = assign_roles(seen.without(rules.ignore), rules.columns, formats)
        self.convert = convert
        self.skip_empty = rules.skip_empty
        self.ignore = rules.ignore
        self.found = Findings()
        if rules.strict:
            self.found.unused = check_unused(seen, self.roles, USED_KEYS, rules.ignore)
            self.found.nothings = words_for_nothing(seen, self.roles)

    def __call__(self, record: Record) -> list[Example]:
        """Return the examples of one record; of one without an answer, none where such rows are skipped."""
        try:
            cells = self._cells(record)
            _check_answered(cells, self.roles)
            return self.convert(cells, self.roles)
        except EmptyAnswerError:
            if not self.skip_empty:
                raise
            self.found.skipped += 1
            return []

    def _cells(self, record: Record) -> Record:
        """Return the cells that play a role, by column: None for an empty one, and chats read from JSON."""
        cells: Record = {}
        for role, column in self.roles.items():
            if column not in record and role not in OPTIONAL and not (role == "prompt" and "chosen" in self.roles):
                kind = EmptyAnswerError if role in (*ANSWERS, "messages") else ValueError
                raise kind(f"no column {column!r} as in other rows, but {short(', '.join(record))}")
            cell = record.get(column)
            chat = as_chat(cell) if role in CHATS else None
            if chat is not None:
                cell = [{key: value for key, value in one.items() if key not in self.ignore} for one in chat]
            cells[column] = None if is_empty(cell) else cell
        return cells


def _check_answered(cells: Record, roles: Roles) -> None:
    """Raise an EmptyAnswerError for a row that has nothing to learn from."""
    for role in ANSWERS:
        if role in roles and cells[roles[role]] is None:
            raise EmptyAnswerError(f"{roles[role]} is empty; accepted: {'a label' if role == 'label' else 'text'}")
    chat = cells.get(roles.get("messages", ""), "")
    if chat is None:
        raise EmptyAnswerError("no assistant message; accepted: at least one to learn from")
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        return
    said = [place for place, message in enumerate(chat, start=1) if role_of(message) == "assistant"]
    if said and all(_says_nothing(chat[place - 1]) for place in said):
        raise EmptyAnswerError(f"message {said[-1]} is empty; accepted: text")
    if not said and all(role_of(message) in ("system", "developer", "user") for message in chat):
        raise EmptyAnswerError("no assistant message; accepted: at least one to learn from")


def _says_nothing(message: dict[str, Any]) -> bool:
    return all(is_empty(value) for key, value in message.items() if key not in ("role", "from", "name"))


class Faults:
    """Count rows that cannot be converted, and keep the first two."""

    def __init__(self, rules: Rules) -> None:
        self.said: list[str] = []
        self.strict = rules.strict
        self.count = self.empty = 0

    def attempt(self, conversion: Conversion, record: Record, place: Callable[[], str]) -> list[Example]:
        """Return the examples of a record; none, and one fault more, where it has one."""
        try:
            return conversion(record)
        except ValueError as error:
            self.count += 1
            self.empty += isinstance(error, EmptyAnswerError)
            if len(self.said) < 2:
                again = self.said and self.said[0].endswith(f": {error}")
                self.said.append(place() if again else f"{place()}: {error}")
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
        if self.count > self.empty and self.strict:
            hint += f"; correct {'all other' if self.empty else 'such'} rows in the file, or take them out of it"
        raise ValueError(self.said[0] + more + hint)


def convert_all(records: list[Record], rules: Rules, formats: Formats, convert: Convert) -> list[Example]:
    """Return records of one of some formats, each by `convert`, which also gets role -> column.

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


def _convert(record: Record, roles: Roles, rules: Rules) -> Example:
    cells = {role: record.get(column) for role, column in roles.items()}
    if "text" in roles:
        return {"text": text_cell(cells["text"], roles["text"])}
    if "messages" in roles:
        chat = chat_cell(cells["messages"], roles["messages"])
    elif isinstance(cells["prompt"], list):  # trl's own form: the turns so far, which are context, and the next
        answer = cells["answer"]
        tail = answer if isinstance(answer, list) else [answer]
        tail = [turn if isinstance(turn, dict) else {"role": "assistant", "content": turn} for turn in tail]
        turns = chat_cell([*map(as_context, cells["prompt"]), *tail], roles["prompt"])
        chat = [*earlier_turns(cells, roles), *turns]
    else:
        answer = text_cell(cells["answer"], roles["answer"]).strip("\r\n")
        messages = [{"role": "user", "content": question_of(cells, roles)}, {"role": "assistant", "content": answer}]
        chat = [*earlier_turns(cells, roles), *messages]
    return conversation(
        with_system(chat, cells.get("system"), roles.get("system", "system")),
        rules.system,
        tools_cell(cells.get("tools"), roles.get("tools", "tools")),
        {**rules.arguments, **template_arguments(cells.get("chat_template_kwargs"), "chat_template_kwargs")},
        rules.last,
    )


def as_context(turn: Any) -> Any:
    """Return a message that is not learned, whoever wrote it."""
    return {**turn, "weight": 0} if isinstance(turn, dict) and role_of(turn) == "assistant" else turn


def question_of(cells: dict[str, Any], roles: Roles) -> str:
    """Return the prompt of a record, with its input below where it has one; without a prompt, the input."""
    extra = cells.get("input")
    if extra is None:
        return text_cell(cells["prompt"], roles["prompt"])
    above = [] if cells["prompt"] is None else [text_cell(cells["prompt"], roles["prompt"])]
    return "\n\n".join([*above, text_cell(extra, roles["input"])])


def earlier_turns(cells: dict[str, Any], roles: Roles) -> list[Message]:
    """Return the turns that a record's history holds: pairs of a question and its answer, or messages."""
    history, name = parsed(cells.get("history")), roles.get("history", "history")
    if history is None:
        return []
    if (chat := as_chat(history)) is not None:
        return chat_cell(chat, name)
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise ValueError(f"{name} is {short(history)}; accepted: a list of pairs, question and answer")
    speakers = ("user", "assistant")
    turns = [(role, text_cell(cell, name)) for pair in history for role, cell in zip(speakers, pair, strict=True)]
    return chat_cell([{"role": role, "content": text} for role, text in turns], name)


Row = dict[str, Any]
