"""Training data: any common record format in, what trl's SFTTrainer takes out, and what it will make of it.

`read` gets records from a file, a folder, a hub or the built-in slice; `examples` recognises their format and makes
them trl's; `split` holds some out; `render` and `audit` show the very tokens that will be trained on. Whatever is wrong
with a user's data is a one-line ValueError that says where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inlay.data.readers import Record
from inlay.messages import short

Example = dict[str, Any]
Formats = dict[str, dict[str, tuple[str, ...]]]


# Format -> role -> the columns that can play it, the preferred one first; of the formats the first that fits is taken.
# Recognition, error messages and docs all come from this table.
FORMATS: Formats = {
    "chat": {"messages": ("messages",)},
    "ShareGPT": {"messages": ("conversations",)},
    "instruction": {
        "prompt": ("instruction",),
        "input": ("input", "context"),
        "answer": ("output", "response", "answer"),
    },
    "prompt-completion": {"prompt": ("prompt",), "answer": ("completion", "response", "answer")},
    "question-answer": {"prompt": ("question",), "answer": ("answer",)},
    "E2E": {"prompt": ("mr",), "answer": ("ref",)},
    "text": {"text": ("text",)},
}
SUMMARIES: Formats = {
    "XSum": {"prompt": ("document",), "answer": ("summary",)},
    "CNN/DailyMail": {"prompt": ("article",), "answer": ("highlights",)},
    "summary": {"prompt": ("text", "dialogue"), "answer": ("summary",)},
}
ROLES = ("prompt", "input", "answer", "messages", "text")
SPEAKERS = {"human": "user", "gpt": "assistant"}


def accepted(formats: Formats = FORMATS) -> str:
    """The record formats in one line, for error messages and docs; brackets hold what is optional."""
    one = {"input": "[{}]"}
    parts = {
        n: " + ".join(one.get(role, "{}").format("|".join(c)) for role, c in f.items()) for n, f in formats.items()
    }
    return ", ".join(f"{name} ({part})" for name, part in parts.items())


def convert_records(
    records: list[Record],
    columns: dict[str, str] | None = None,
    system: str | None = None,
    formats: Formats = FORMATS,
) -> list[Example]:
    """Records of one format as trl's conversational prompt and completion, or as {"text": ...} for plain text.

    `columns` maps roles (prompt, input, answer, messages, text) to columns, over the recognised ones; a mapped prompt
    is the whole prompt, unless an input is mapped too. A chat becomes one example per assistant turn: trl takes the
    loss over a completion with any chat template, but its `assistant_only_loss` needs one with generation markers,
    which few have. Newlines around an answer are dropped: they would merge with the template's own into tokens that
    the model never sees when it answers.
    """

    def convert(record: Record, roles: dict[str, str]) -> list[Example]:
        if system is not None and "text" in roles:
            raise ValueError("a system message needs a prompt to stand before; plain text has none")
        return _convert(record, roles, system)

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
            missing = [column for role, column in roles.items() if column not in record and role != "input"]
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
        if not strange and all(column or role == "input" for role, column in chosen.items()):
            return {role: column for role, column in chosen.items() if column}
    raise ValueError(
        f"no record format fits the columns {listed}; accepted: {accepted(formats)}; or map them: "
        f"{{{known[0]}: ..., {known[1]}: ...}}"
    )


def _convert(record: Record, roles: dict[str, str], system: str | None) -> list[Example]:
    cells = {role: record.get(column) for role, column in roles.items()}
    if "text" in roles:
        return [{"text": text_cell(cells["text"], roles["text"])}]
    if "messages" in roles:
        return chat_turns(chat_cell(cells["messages"], roles["messages"]), system)
    prompt, answer = cells["prompt"], cells["answer"]
    if isinstance(prompt, list):  # trl's own form: the turns so far, and the next
        tail = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return chat_turns(chat_cell(prompt + tail, roles["prompt"]), system)[-1:]
    question = text_cell(prompt, roles["prompt"])
    extra = cells.get("input")
    if extra is not None and str(extra).strip():
        question += "\n\n" + text_cell(extra, roles["input"])
    answer = text_cell(answer, roles["answer"])
    return chat_turns([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], system)


def text_cell(cell: Any, name: str) -> str:
    """A cell that has to be text; raises a ValueError that says what it is."""
    if isinstance(cell, str) and cell.strip():
        if any("\ud800" <= c <= "\udfff" for c in cell):  # JSON can write it, no tokenizer reads it
            raise ValueError(f"{name} is {short(cell)}, with half of a surrogate pair; accepted: text")
        return cell
    found = "empty" if cell is None or isinstance(cell, str) else f"the {type(cell).__name__} {short(cell)}"
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
