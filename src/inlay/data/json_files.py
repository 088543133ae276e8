"""JSON as people have it: one object a line, one list of objects, or a list wrapped in an object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from inlay.data.records import Numbered, Record, refusal
from inlay.messages import short

LIST, LINE = "a list of JSON objects, or one object a line", "one JSON object a line"
Lines = Iterator[tuple[int, str]]


def json_records(
    path: Path, lines: Lines, one_a_line: bool, notes: list[str], whole: bool = True
) -> tuple[str, Numbered]:
    """Yield the records of a JSON file in any of its forms, each with the line it begins at or its number in a list.

    Before them comes which of the two it is.

    `one_a_line` says what its name promises, .jsonl. Unless the file may be held in memory (`whole`), a list
    is refused.
    """
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return "line", ()
    is_list = first[1].lstrip().startswith("[") and not is_chat(first[1])
    if not whole and (is_list or not one_a_line):
        command = f"jq -c '.[]' {path.name} > lines.jsonl"
        raise refusal(path, "one JSON list", f"{LINE} where data is streamed ({command})")
    if not is_list and (one_a_line or is_json_object(first[1]) or is_chat(first[1])):
        second = next(((number, line) for number, line in lines if line.strip()), None)
        if one_a_line or second is not None:
            return "line", _by_line(path, chain([first], [second] if second else [], lines))
    text = "\n" * (first[0] - 1) + "\n".join(line for _, line in chain([first], lines))
    return "row", enumerate(_listed(_parse(text, path, 1, LIST), path, notes), start=1)


def is_json_object(line: str) -> bool:
    """Return whether a line of a text is a JSON object."""
    try:
        return line.lstrip().startswith("{") and isinstance(load_json(line), dict)
    except ValueError:
        return False


def is_chat(line: str) -> bool:
    """Return whether a line of a text is a chat: a JSON list of messages."""
    try:
        return line.lstrip().startswith("[") and _record(load_json(line)) is not None
    except ValueError:
        return False


def _record(value: object) -> Record | None:
    """Return a JSON value as a record: an object, or a list of messages; None where it is neither."""
    return {"messages": value} if _chat(value) else value if isinstance(value, dict) else None


def _chat(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: object) -> bool:
    """Return whether a value is a message, by OpenAI's keys or ShareGPT's."""
    keys = value.keys() if isinstance(value, dict) else set()
    return {"role", "content"} <= keys or {"role", "tool_calls"} <= keys or {"from", "value"} <= keys


def _by_line(path: Path, lines: Lines) -> Iterator[tuple[int, Record]]:
    for number, line in lines:
        if line.strip():
            record = _record(_parse(line, path, number, _line_by_line(path, line)))
            if record is None:
                raise refusal(f"{path}, line {number}", short(line), LINE)
            yield number, record


def _line_by_line(path: Path, line: str) -> str:
    """Return what is accepted, with the command that makes it of objects that take several lines, or stand on one."""
    open_object = line.strip() in ("{", "[") or "}{" in line.replace(" ", "")
    return LINE + (f" (jq -c . {path.name} > lines.jsonl writes it so)" if open_object else "")


def _listed(value: Any, path: Path, notes: list[str]) -> list[Record]:
    """Return a JSON value as records: the list itself, or the only list of records in an object around it."""
    if isinstance(value, dict):
        lists = {key: inner for key, inner in value.items() if _records(inner)}
        if len(lists) == 1:
            ((key, records),) = lists.items()
            others = [other for other in value if other != key]
            notes.append(
                f"{path.name}: records are under {key!r}" + (f"; not used: {', '.join(others)}" if others else "")
            )
            return records
        raise refusal(path, short(value), f"{LIST} {_advice(value, list(lists), path)}".rstrip())
    if _chat(value):
        return [{"messages": value}]
    records = [_record(one) for one in value] if isinstance(value, list) else [None]
    if None in records:
        raise refusal(path, short(value), LIST)
    return [record for record in records if record is not None]


def _records(value: Any) -> bool:
    """Return whether a value is a list of records; a chat's messages are not."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value) and not _chat(value)


def _advice(value: dict[str, Any], lists: list[str], path: Path) -> str:
    if lists:
        return f"(several lists: {', '.join(lists)}; jq .{lists[0]} {path.name} > one.json takes one out)"
    chats = any(isinstance(inner, list) and inner and isinstance(inner[0], dict) for inner in value.values())
    if value and not chats and all(isinstance(inner, (dict, list)) for inner in value.values()):
        return "(of pandas: df.to_json(path, orient='records', lines=True))"
    return "(one object alone is written in [ ])"


def load_json(text: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or an object names a key twice, of which one would be lost.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return made


def _parse(text: str, path: Path, line: int, wanted: str) -> Any:
    try:
        return load_json(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line + error.lineno - 1}"
        if text[: error.pos].rstrip().endswith(",") and text[error.pos : error.pos + 1] in ("]", "}", ""):
            before = line + text[: error.pos].rstrip().count("\n")
            raise refusal(
                place, f"a comma with nothing after it (line {before})", f"{wanted}; remove the comma"
            ) from error
        raise refusal(place, f"{_around(text, error)} ({error.msg})", wanted) from error
    except ValueError as error:  # a number of more digits than are read, or a key that stands twice
        place = f"{path}, line {line}" if "\n" not in text.strip() else f"{path}, from line {line} on"
        raise refusal(place, f"{short(text.strip())} ({error})", wanted) from error


def _around(text: str, error: json.JSONDecodeError) -> str:
    """Return the faulty line, or of a long one what stands around the fault."""
    culprit = text.split("\n")[error.lineno - 1]
    if len(culprit) > 57 and error.colno > 40:
        culprit = "..." + culprit[error.colno - 25 : error.colno + 20]
    return short(culprit)
