"""Records with labels, in GLUE's forms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from inlay.data.chats import EmptyAnswerError, text_cell
from inlay.data.formats import Row, Rules, convert_all
from inlay.data.records import Record
from inlay.messages import short

LABELLED_FORMATS = {
    "pair": {
        "text": ("sentence1", "premise", "question1", "question"),
        "pair": ("sentence2", "hypothesis", "question2", "sentence"),
        "label": ("label",),
    },
    "sentence": {"text": ("sentence", "text"), "label": ("label",)},
}


def labelled_examples(records: list[Record], rules: Rules | None = None) -> list[Row]:
    """Return records as {"text", "pair" (or None), "label"}; a label as the text of it.

    A label of -1 stands, by the custom of data sets on the Hub, for a row without one, unless labels are scores.
    """
    rules = rules or Rules(strict=False)
    scores: list[bool] = []

    def row(record: Record, roles: dict[str, str]) -> list[Row]:
        label = label_text(record[roles["label"]], roles["label"])
        if not scores:
            scores.append(any(_has_fraction(one.get(roles["label"])) for one in records))
        if label == "-1" and not scores[0]:
            raise EmptyAnswerError(
                f"{roles['label']} is -1, which marks a row without a label; accepted: a label (a class gets a name)"
            )
        pair = record.get(roles.get("pair", ""))
        text = text_cell(record[roles["text"]], roles["text"])
        return [{"text": text, "pair": None if pair is None else text_cell(pair, roles["pair"]), "label": label}]

    return convert_all(records, rules, LABELLED_FORMATS, row)


def label_text(cell: Any, name: str) -> str:
    """Return a label as text: 1, 1.0, "1" and "1.0" are one label, and so are true, "true" and "True".

    Raises:
        ValueError: it is no single value.
    """
    if isinstance(cell, (list, dict)):
        raise ValueError(f"{name} is {short(cell)}; accepted: a label")
    text = str(cell).strip()
    if re.fullmatch(r"-?(0|[1-9]\d*)\.0+", text):
        return text.partition(".")[0]
    return text.capitalize() if text.lower() in ("true", "false") else text


def _has_fraction(cell: Any) -> bool:
    try:
        return not float(cell).is_integer()
    except (TypeError, ValueError, OverflowError):
        return False


def one_label(label: str, labels: Iterable[str]) -> str:
    """Return the name that a label has among others: of true and false, 1 and 0 where these are among them."""
    number = {"True": "1", "False": "0"}.get(label, label)
    return number if number in labels else label


def alike(labels: Iterable[str]) -> list[str]:
    """Return labels that differ in capitals alone, in groups as text."""
    groups: dict[str, list[str]] = {}
    for label in sorted(labels):
        groups.setdefault(label.lower(), []).append(label)
    return [" and ".join(group) for group in groups.values() if len(group) > 1]
