"""Records with labels, in GLUE's forms."""

from __future__ import annotations

from inlay.data.chats import text_cell
from inlay.data.formats import Row, convert_all
from inlay.data.readers import Record
from inlay.messages import short

LABELLED_FORMATS = {
    "pair": {
        "text": ("sentence1", "premise", "question1", "question"),
        "pair": ("sentence2", "hypothesis", "question2", "sentence"),
        "label": ("label",),
    },
    "sentence": {"text": ("sentence", "text"), "label": ("label",)},
}


def labelled_examples(records: list[Record], columns: dict[str, str]) -> list[Row]:
    """Records as {"text", "pair" (or None), "label"}; a label as the text of it."""

    def row(record: Record, roles: dict[str, str]) -> list[Row]:
        label = record[roles["label"]]
        if label is None or not str(label).strip() or isinstance(label, (list, dict)):
            raise ValueError(f"{roles['label']} is {short(label)}; accepted: a label")
        pair = text_cell(record[roles["pair"]], roles["pair"]) if "pair" in roles else None
        text = text_cell(record[roles["text"]], roles["text"])
        return [{"text": text, "pair": pair, "label": str(label).strip()}]

    return convert_all(records, columns, LABELLED_FORMATS, row)
