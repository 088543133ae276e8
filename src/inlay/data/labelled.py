"""Records with labels, in GLUE's forms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from inlay.data.chats import EmptyAnswerError, text_cell
from inlay.data.columns import is_empty
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

    The label that stands for none is -1, as in data sets on the Hub, or what the rules say. Among scores it is a score,
    and where 1 is the only other label it is a class.
    """
    rules = rules or Rules(strict=False)
    classes: list[bool] = []

    def row(record: Record, roles: dict[str, str]) -> list[Row]:
        label = label_text(record[roles["label"]], roles["label"])
        if label == rules.unlabelled:
            if not classes:
                classes.append(_are_classes([one.get(roles["label"]) for one in records], label))
            if not classes[0]:
                raise EmptyAnswerError(
                    f"{roles['label']} is {label}, which marks a row without a label; accepted: a label (--unlabelled "
                    f"none makes {label} a class)"
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


def _are_classes(cells: list[object], none: str) -> bool:
    """Return whether the label that stands for none cannot do so: among scores, and as -1 beside 1 alone."""
    others = {str(cell).strip().removesuffix(".0") for cell in cells if not is_empty(cell)} - {none}
    return any(map(_has_fraction, cells)) or (none == "-1" and others == {"1"})


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
