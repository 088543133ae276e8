"""Which columns play which role, which ones are left, and which of these must not be.

A `Survey` says what stands in the columns of all rows; `assign_roles` decides by it, so the order of rows does not
matter, and reading a file gives the same examples as streaming it.
"""

from __future__ import annotations

import math
import re
import shlex
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from inlay.data.json_files import load_json
from inlay.data.records import Record
from inlay.messages import short

Formats = dict[str, dict[str, tuple[str, ...]]]
Roles = dict[str, str]

# Roles that no row needs; the others every row has to fill.
OPTIONAL = ("input", "system", "history", "tools", "chat_template_kwargs")
CHATS = ("messages", "chosen", "rejected")  # roles whose cells may be chats, also as JSON in a string
ANSWERS = ("answer", "chosen", "rejected", "label")  # roles without which nothing is learned of a row

# What changes the meaning of a row. A column or message key of these names, if nothing uses it, is refused: where it
# says anything; where it is other than 1 or true; where it is 0 or false.
MEANING = ("tools", "functions", "available_tools", "tool_calls", "function_call", "history", "chat_history",
           "conversation_history", "system", "system_prompt", "system_message", "image", "images", "audio", "audios",
           "video", "videos")  # fmt: skip
WEIGHTS = ("weight", "weights", "loss", "loss_weight", "train", "trainable", "training", "mask", "masked",
           "loss_mask", "train_detail", "training_detail")  # fmt: skip
VERDICTS = ("label", "is_correct", "correct", "accepted", "approved")
MESSAGE = ({"role", "content"}, {"from", "value"})  # columns of files with one message a row
NOTHINGS = ("NA", "N/A", "n/a", "<NA>", "NaN", "nan", "NULL", "null", "None", "#N/A")
TRUE, FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")


@dataclass
class Column:
    """Hold what was seen in one column, or under one key of its messages: cells that are empty count as absent."""

    kind: Literal["text", "number", "chat", "other"]
    neutral: bool = True  # all are 1 or true
    negative: bool = False  # some are 0 or false
    nothings: dict[str, int] = field(default_factory=dict)  # words such as NA that may be meant as no text

    def add(self, cell: Any) -> None:
        """Count in one more cell."""
        if isinstance(cell, str) and cell in NOTHINGS:
            self.nothings[cell] = self.nothings.get(cell, 0) + 1
        text = str(cell).strip().lower() if not isinstance(cell, str) or len(cell) < 10 else ""
        self.neutral = self.neutral and text in TRUE
        self.negative = self.negative or text in FALSE

    def matters(self, name: str, answered: bool) -> bool:
        """Return whether leaving it out would change what a row means, which may be `answered` or plain text."""
        name = plain_name(name)
        judged = answered and name in VERDICTS and self.negative
        return name in MEANING or (name in WEIGHTS and not self.neutral) or judged


@dataclass
class Survey:
    """Hold all columns of some records in their order, what they hold, and the keys of the chats in them."""

    names: dict[str, None] = field(default_factory=dict)
    columns: dict[str, Column] = field(default_factory=dict)
    keys: dict[str, dict[str, Column]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Count in one more record."""
        for name, cell in record.items():
            self.names.setdefault(name)
            if is_empty(cell):
                continue
            chat = as_chat(cell)
            if name not in self.columns:
                self.columns[name] = Column(_kind(cell, chat))
            self.columns[name].add(cell if chat is None else "")
            for message in chat or ():
                self._add_message(name, message)

    def without(self, ignore: Iterable[str]) -> Survey:
        """Return the survey without the columns that are not to be used."""
        return Survey({name: None for name in self.names if name not in ignore}, self.columns, self.keys)

    def _add_message(self, name: str, message: dict[str, Any]) -> None:
        keys = self.keys.setdefault(name, {})
        for key, value in message.items():
            if not is_empty(value):
                keys.setdefault(key, Column("other")).add(value if isinstance(value, (str, int, float)) else "")


def survey(records: Iterable[Record]) -> Survey:
    """Return what all of these records hold."""
    made = Survey()
    for record in records:
        made.add(record)
    return made


def _kind(cell: Any, chat: list | None) -> Literal["text", "number", "chat", "other"]:
    if chat is not None:
        return "chat"
    if isinstance(cell, str):
        return "number" if re.fullmatch(r"\s*-?\d+([.,]\d+)?\s*", cell) else "text"
    return "number" if isinstance(cell, (int, float)) else "other"


def is_empty(cell: Any) -> bool:
    """Return whether a cell says nothing: null, NaN, no text that could be seen, a list or an object of nothing."""
    if isinstance(cell, str):
        return not cell[:1].isalnum() and not any(map(_visible, cell))
    return (
        cell is None or (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, (list, dict)) and not cell)
    )


def _visible(character: str) -> bool:
    if character.isprintable():
        return not character.isspace()
    return unicodedata.category(character) not in ("Cc", "Cf", "Zs", "Zl", "Zp")


def as_chat(cell: Any) -> list[dict[str, Any]] | None:
    """Return a cell as a list of messages, read from JSON where it is a string; None where it is no such list."""
    if isinstance(cell, str) and cell.lstrip().startswith("[") and ("role" in cell or "from" in cell):
        try:
            cell = load_json(cell)
        except ValueError:
            return None
    if isinstance(cell, list) and cell and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in cell):
        return cell
    return None


# -- roles -------------------------------------------------------------------------------------------------------------


def assign_roles(seen: Survey, mapped: Roles, formats: Formats) -> Roles:
    """Return role -> column by the first format that fits, the user's mapping laid over it.

    Raises:
        ValueError: a mapped role or column does not exist, or no format fits; with a mapping that would.
    """
    known = list(dict.fromkeys(role for format in formats.values() for role in format))
    listed = ", ".join(map(short, seen.names))
    for role, column in mapped.items():
        if role not in known:
            meant = next((own for one in formats.values() for own, names in one.items() if role in names), None)
            hint = f"; did you mean {meant}: {mapped[role]}?" if meant else ""
            raise ValueError(f"columns: found the role {role!r}; accepted: {', '.join(known)}{hint}")
        if column not in seen.names:
            raise ValueError(f"columns: {role} is mapped to {column!r}, which is not among the columns {listed}")
    for format in formats.values():
        if roles := _fitting(format, seen, mapped):
            return roles
    if messages := next((keys for keys in MESSAGE if seen.names and keys <= set(map(plain_name, seen.names))), None):
        shown = " and ".join(sorted(messages, reverse=True))
        raise ValueError(
            f"the rows are messages ({listed}); accepted: a row for each chat, which holds its messages, with {shown}, "
            "in a list under messages"
        )
    pairs = {"chosen", "rejected"} <= seen.names.keys() and "chosen" not in known
    raise ValueError(
        f"no record format fits the columns {listed}; accepted: {accepted(formats)}; or map them: "
        f"--columns {_mapping(seen, mapped, formats)}" + "; or learn preferences: --task preference" * pairs
    )


def _fitting(format: dict[str, tuple[str, ...]], seen: Survey, mapped: Roles) -> Roles | None:
    """Return the roles of one format, or None where a column is missing; a mapped prompt is the whole prompt."""
    names = format | {role: (column,) for role, column in mapped.items()}
    if "prompt" in mapped and "input" not in mapped:
        names.pop("input", None)
    chosen = {role: _column(candidates, seen) for role, candidates in names.items()}
    allowed = {*format, *(OPTIONAL if "prompt" in format or "messages" in format else ())}
    if mapped.keys() <= allowed and all(column or role in OPTIONAL for role, column in chosen.items()):
        taken = {c for role, c in chosen.items() if c and role not in OPTIONAL}  # a column plays one role
        return {r: c for r, c in chosen.items() if c and (r not in OPTIONAL or r in mapped or c not in taken)}
    return None


def _column(candidates: tuple[str, ...], seen: Survey) -> str | None:
    """Return the column of the first name that there is, spelled so, or else in other capitals or with other spaces."""
    spelled = {plain_name(name): name for name in reversed(seen.names)}
    exact = next((name for name in candidates if name in seen.names), None)
    return exact or next((spelled[name] for name in candidates if name in spelled), None)


def plain_name(name: str) -> str:
    """Return the name of a column in small letters, with underscores for the spaces and hyphens in it."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def accepted(formats: Formats) -> str:
    """Return the record formats in one line, for error messages and docs; brackets hold what is optional."""
    shown = {
        name: [role for role in roles if role == "input" or role not in OPTIONAL] for name, roles in formats.items()
    }
    parts = {
        name: " + ".join(("[{}]" if role == "input" else "{}").format("|".join(formats[name][role])) for role in roles)
        for name, roles in shown.items()
    }
    return ", ".join(f"{name} ({part})" for name, part in parts.items())


def _mapping(seen: Survey, mapped: Roles, formats: Formats) -> str:
    """Return a value of --columns to be pasted: roles by name where names fit, the other columns in their order."""
    guesses = [guess for format in formats.values() if (guess := _guess(format, seen, mapped))]
    if guesses:
        roles = max(guesses, key=lambda guess: guess[:2])[2]
    else:
        roles = {role: "NAME" for role in next(iter(formats.values())) if role not in OPTIONAL}
    flow = yaml.safe_dump(roles, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return shlex.quote(flow.strip())


def _guess(format: dict[str, tuple[str, ...]], seen: Survey, mapped: Roles) -> tuple[int, int, Roles] | None:
    """Return a mapping to one format, and how many roles it fills by name and by any column; None if one is missing."""
    roles = {role: column for role, candidates in format.items() if (column := _column(candidates, seen))} | mapped
    by_name = len(roles)
    for role in format:
        if role in roles or role in OPTIONAL:
            continue
        kinds = ("chat",) if role == "messages" else ("text", "number", "chat") if role in ANSWERS else ("text",)
        free = {name: column.kind for name, column in seen.columns.items() if name not in roles.values()}
        column = next((name for kind in kinds for name in free if free[name] == kind), None)
        if column is None:
            return None
        roles[role] = column
    return (by_name, len(roles), roles) if mapped.keys() <= {*format, *OPTIONAL} else None


# -- what is left ------------------------------------------------------------------------------------------------------


@dataclass
class Unused:
    """Collect columns that hold something and play no role, over all sources of a run."""

    columns: dict[str, None] = field(default_factory=dict)

    def __str__(self) -> str:
        names = [name if name.isprintable() else short(name) for name in self.columns]
        return f"not used: columns {', '.join(names)}" if names else ""


def words_for_nothing(seen: Survey, roles: Roles) -> list[str]:
    """Return a line for each column of a role whose cells are words that may be meant as no text."""
    found = {name: seen.columns[name].nothings for name in roles.values() if name in seen.columns}
    return [
        f"{short(name)}: {', '.join(f'{count} × {word}' for word, count in words.items())}, which are text; a cell "
        "that says nothing has to be empty"
        for name, words in found.items()
        if words
    ]


def check_unused(seen: Survey, roles: Roles, used_keys: Iterable[str], ignore: Iterable[str]) -> Unused:
    """Return the columns that play no role.

    Raises:
        ValueError: one does, or a key of the messages, that changes what a row means and that no one said to ignore.
    """
    columns = {name: column for name, column in seen.columns.items() if name not in roles.values()}
    chats = [column for column in roles.values() if column in seen.keys]
    keys = {key: value for chat in chats for key, value in seen.keys[chat].items() if key not in used_keys}
    answered = any(role in roles for role in ("answer", "messages"))
    for what, found in (("column", columns), ("message key", keys)):
        for name, one in found.items():
            if one.matters(name, answered) and name not in ignore:
                raise ValueError(f"{_reason(what, name)}; --ignore {shlex.quote(name)} trains as if it were not there")
    return Unused(dict.fromkeys(columns))


def _reason(what: str, name: str) -> str:
    if plain_name(name) in VERDICTS:
        return (
            f"{what} {name!r} says of some rows that their answer is a bad one (0 or false), and all answers would be "
            f"learned; leave those rows out (jq -c 'select(.{name})' in.jsonl > out.jsonl)"
        )
    return f"{what} {name!r} changes what is to be learned of a row, but nothing here uses it"
