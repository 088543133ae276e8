"""A file of prompts, and the file of their answers: a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inlay.data.chats import Example, chat_cell, template_arguments, text_cell, with_system
from inlay.data.readers import Record, read_records
from inlay.data.records import place_of
from inlay.evaluation.growing import Growing
from inlay.files.atomic import locked, write_text
from inlay.files.untrusted import regular_file, user_path


@dataclass(frozen=True)
class Asked:
    """Hold a row of a file of prompts, and the conversation that it asks."""

    row: Record
    asked: Example


def read_prompts(path: str) -> list[Asked]:
    """Return the rows of a file with the conversation that each one asks.

    A row has `prompt`, a text or a list of messages, or `messages`, whose last one is not the assistant's; it may have
    `system` and `chat_template_kwargs`. Whatever else is in it goes along to the answer.

    Raises:
        ValueError: the file cannot be read, or a row has no prompt.
    """
    if not regular_file(user_path(path)).is_file():
        raise ValueError(f"--prompts {path}: there is no such file; give one with a JSON object a line")
    records = read_records(path)
    rows = []
    for number, record in enumerate(records):
        try:
            rows.append(Asked(record, asked_by(record)))
        except ValueError as error:
            raise ValueError(f"{path}, {place_of(records, number)}: {error}") from None
    return rows


def asked_by(record: Record) -> Example:
    """Return the conversation that a row asks."""
    name = next((name for name in ("prompt", "messages") if record.get(name) is not None), None)
    if name is None:
        raise ValueError(f"it has {', '.join(record)}; accepted: prompt (text or messages), or messages")
    cell = record[name]
    if name == "prompt" and isinstance(cell, str) and not cell.lstrip().startswith("["):
        chat = [{"role": "user", "content": text_cell(cell, name)}]
    else:
        chat = chat_cell(cell, name)
    if not chat or chat[-1]["role"] == "assistant":
        raise ValueError(f"{name} ends with an answer, or is empty; accepted: messages up to a question")
    arguments = template_arguments(record.get("chat_template_kwargs"), "chat_template_kwargs")
    example: Example = {"prompt": with_system(chat, record.get("system"), "system")}
    return example | ({"chat_template_kwargs": arguments} if arguments else {})


def check_new_file(path: Path, overwrite: bool) -> None:
    """Raise a ValueError where the file `path` cannot be written, or is there and may not be replaced."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--output {path} cannot be written: give a file in a folder that is there")
    if path.exists() and not overwrite:
        raise ValueError(f"--output {path} exists; choose another file or pass --overwrite")


def write_answers(path: Path, rows: Sequence[Asked], answers: Sequence[Growing], overwrite: bool) -> None:
    """Write each row with its `answer`, its `tokens` and whether it was `cut`, a line each; whole or not at all."""
    lines = [
        {**row.row, "answer": one.text, "tokens": len(one.ids), "cut": one.cut}
        for row, one in zip(rows, answers, strict=True)
    ]
    with locked(path):
        check_new_file(path, overwrite)
        write_text(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))
