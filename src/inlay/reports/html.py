"""Build HTML pages that need no other file: their style, sortable tables, cells."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from inlay.messages import one_line

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); }
@media (max-width: 40rem) { .wide th { display: none; } .wide td { display: block; border: 0; padding: .2rem 0; }
  .wide td::before { content: attr(data-name) ": "; font-weight: 600; }
  .wide tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--line); } }
.scroll { overflow-x: auto; } .scroll table { white-space: nowrap; font-variant-numeric: tabular-nums; }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: Canvas; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: calc(var(--inches) * 96px); min-width: var(--least); max-width: 100%; height: auto; }
pre { overflow-x: auto; padding: 1rem; border: 1px solid var(--line); }
"""

SORT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th").forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", body = table.tBodies[0];
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value, number = row => key(row) === "" ? Infinity : Number(key(row));
    const order = (a, b) => number(a) - number(b) || key(a).localeCompare(key(b));
    const text = (a, b) => key(a).localeCompare(key(b));
    const numeric = [...body.rows].every(row => !Number.isNaN(number(row)));
    body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * (numeric ? order : text)(a, b)));
  }));
"""


def sortable_table(heads: Sequence[str], body: str) -> str:
    """Return a table that is sorted by a click on a head; `body` consists of rows of `html_cell`s."""
    head = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in heads)
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def html_cell(text: str, value: str | float) -> str:
    """Return a table cell with the `value` that it is sorted by; empty where the value is NaN."""
    missing = isinstance(value, float) and math.isnan(value)
    return f'<td data-value="{"" if missing else html.escape(str(value))}">{"" if missing else html.escape(text)}</td>'


def html_document(title: str, body: str, style: str = "") -> str:
    """Return a page with its `title` as the heading."""
    name = html.escape(one_line(title))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><style>{STYLE}{style}</style></head><body>
<h1>{name}</h1>
{body}
</body></html>
"""
