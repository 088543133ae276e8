"""Training data: any common record format in, what trl's SFTTrainer takes out, and what it will make of it.

`read` gets records from a file, a folder, a hub or the built-in slice; `examples` recognises their format and makes
them trl's; `split` holds some out; `render` and `audit` show the very tokens that will be trained on. Whatever is wrong
with a user's data is a one-line ValueError that says where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inlay.data.chats import Example, chat_cell, conversation, template_arguments, text_cell, tools_cell, with_system
from inlay.data.readers import Record
from inlay.messages import short

Formats = dict[str, dict[str, tuple[str, ...]]]


# Format -> role -> the columns that can play it, the preferred one first; of the formats the first that fits is taken.
# Recognition, error messages and docs all come from this table.
CHAT: dict[str, tuple[str, ...]] = {  # what a conversation may have beside its messages
    "system": ("system",),
    "tools": ("tools", "functions"),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
FORMATS: Formats = {
    "chat": {"messages": ("messages",), **CHAT},
    "ShareGPT": {"messages": ("conversations",), **CHAT},
    "instruction": {
        "prompt": ("instruction",),
        "input": ("input", "context"),
        "answer": ("output", "response", "answer"),
        "history": ("history",),
        **CHAT,
    },
    "prompt-completion": {"prompt": ("prompt",), "answer": ("completion", "response", "answer"), **CHAT},
    "question-answer": {"prompt": ("question",), "answer": ("answer",)},
    "E2E": {"prompt": ("mr",), "answer": ("ref",)},
    "text": {"text": ("text",)},
}
SUMMARIES: Formats = {
    "XSum": {"prompt": ("document",), "answer": ("summary",)},
    "CNN/DailyMail": {"prompt": ("article",), "answer": ("highlights",)},
    "summary": {"prompt": ("text", "dialogue"), "answer": ("summary",)},
}
SPEAKERS = ("user", "assistant")  # of a pair in a history
OPTIONAL = ("input", "history", *CHAT)
ROLES = ("prompt", "input", "answer", "messages", "text", "history", *CHAT)


def accepted(formats: Formats = FORMATS) -> str:
    """The record formats in one line, for error messages and docs; brackets hold what is optional."""
    one = dict.fromkeys(OPTIONAL, "[{}]")
    parts = {
        n: " + ".join(one.get(role, "{}").format("|".join(c)) for role, c in f.items()) for n, f in formats.items()
    }
    return ", ".join(f"{name} ({part})" for name, part in parts.items())


def convert_records(
    records: list[Record],
    columns: dict[str, str] | None = None,
    system: str | None = None,
    formats: Formats = FORMATS,
    arguments: dict[str, Any] | None = None,
    last: bool = False,
) -> list[Example]:
    """Records of one format as conversations (see `chats`), or as {"text": ...} for plain text.

    `columns` maps roles (prompt, input, answer, messages, text) to columns, over the recognised ones; a mapped prompt
    is the whole prompt, unless an input is mapped too. `arguments` are the chat template's, below a record's own;
    `last`: of a conversation's answers only the last is learned.
    """

    def convert(record: Record, roles: dict[str, str]) -> list[Example]:
        if system is not None and "text" in roles:
            raise ValueError("a system message needs a prompt to stand before; plain text has none")
        return [_convert(record, roles, system, arguments or {}, last)]

    return convert_all(records, columns or {}, formats, convert)


def convert_all(
    records: list[Record],
    columns: dict[str, str],
    formats: Formats,
    convert: Callable[[Record, dict[str, str]], list[Example]],
) -> list[Example]:
    """Records of one of some formats, each by `convert`, which also gets role -> column.

    Raises:
        ValueError: there are none, no format fits them, or rows are at fault: the first two, and how many.
    """
    if not records:
        raise ValueError("found no records; accepted: at least one")
    roles = recognise_format(list(records[0]), columns, formats)
    found, faults = [], []
    for number, record in enumerate(records, start=1):
        try:
            missing = [column for role, column in roles.items() if column not in record and role not in OPTIONAL]
            if missing:
                raise ValueError(f"no column {missing[0]!r} as in row 1, but {short(', '.join(record))}")
            found += convert(record, roles)
        except ValueError as error:
            faults.append(f"row {number}: {error}")
    if faults:
        raise ValueError(faults[0] + (f" ({len(faults)} rows at fault, next {faults[1]})" if len(faults) > 1 else ""))
    return found


def recognise_format(found: list[str], mapped: dict[str, str], formats: Formats = FORMATS) -> dict[str, str]:
    """Role -> column by the first format that fits, the user's mapping laid over it."""
    listed = ", ".join(map(short, found))
    known = list(dict.fromkeys(role for format in formats.values() for role in format))
    known.sort(key=lambda role: ROLES.index(role) if role in ROLES else len(ROLES))
    for role, column in mapped.items():
        if role not in known:
            raise ValueError(f"columns: found the role {role!r}; accepted: {', '.join(known)}")
        if column not in found:
            raise ValueError(f"columns: {role} is mapped to {column!r}, which is not among the columns {listed}")
    for format in formats.values():
        names = format | {role: (column,) for role, column in mapped.items()}
        if "prompt" in mapped and "input" not in mapped:
            names.pop("input", None)
        chosen = {role: next((c for c in candidates if c in found), None) for role, candidates in names.items()}
        strange = mapped.keys() - format.keys() - ({"input"} if "prompt" in format else set())
        if not strange and all(column or role in OPTIONAL for role, column in chosen.items()):
            return {role: column for role, column in chosen.items() if column}
    raise ValueError(
        f"no record format fits the columns {listed}; accepted: {accepted(formats)}; or map them: "
        f"{{{known[0]}: ..., {known[1]}: ...}}"
    )


def _convert(
    record: Record, roles: dict[str, str], system: str | None, arguments: dict[str, Any], last: bool
) -> Example:
    cells = {role: record.get(column) for role, column in roles.items()}
    if "text" in roles:
        return {"text": text_cell(cells["text"], roles["text"])}
    if "messages" in roles:
        chat = chat_cell(cells["messages"], roles["messages"])
    elif isinstance(cells["prompt"], list):  # trl's own form: the turns so far, which are context, and the next
        answer = cells["answer"]
        tail = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        chat = chat_cell([*map(as_context, cells["prompt"]), *tail], roles["prompt"])
    else:
        chat = [*history(cells.get("history")), *question_and_answer(cells, roles)]
    return conversation(
        with_system(chat, cells.get("system"), "system"),
        system,
        tools_cell(cells.get("tools"), roles.get("tools", "tools")),
        {**arguments, **template_arguments(cells.get("chat_template_kwargs"), "chat_template_kwargs")},
        last,
    )


def as_context(turn: Any) -> Any:
    """A message that is not learned, whoever wrote it."""
    return {**turn, "weight": 0} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn


def history(cell: Any) -> list[dict[str, Any]]:
    """Alpaca's turns before an instruction: pairs of a question and its answer."""
    if cell is None or cell == "":
        return []
    if not isinstance(cell, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in cell):
        raise ValueError(f"history is {short(cell)}; accepted: a list of pairs, question and answer")
    return chat_cell(
        [{"role": role, "content": text} for pair in cell for role, text in zip(SPEAKERS, pair, strict=True)],
        "history",
    )


def question_and_answer(cells: dict[str, Any], roles: dict[str, str]) -> list[dict[str, Any]]:
    """Two columns, or three, as two messages."""
    question = text_cell(cells["prompt"], roles["prompt"])
    extra = cells.get("input")
    if extra is not None and str(extra).strip():
        question += "\n\n" + text_cell(extra, roles["input"])
    answer = text_cell(cells["answer"], roles["answer"])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip("\r\n")}]


Row = dict[str, Any]
