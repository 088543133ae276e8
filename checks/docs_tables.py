"""Write the tables of docs/ that the package itself can tell: `make docs-tables`.

A method's row comes from its class, its number of trained parameters from the built-in model's shapes.
"""

from __future__ import annotations

import re
from pathlib import Path

from inlay.cli.flags import FILE
from inlay.cli.inspect import count
from inlay.cli.recipe_reference import flag_table, recipe_reference
from inlay.method import Method
from inlay.methods import METHODS
from inlay.models.base import BaseModel

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by `make docs-tables` -->", "<!-- end -->"


def paper(method: type[Method]) -> str:
    """Return a paper's arXiv number with its address, or how else the class names it."""
    number = re.search(r"arXiv (\d{4}\.\d{4,5})(.*)", method.paper)
    return method.paper if number is None else f"[{number[1]}](https://arxiv.org/abs/{number[1]}){number[2]}"


def first_sentence(method: type[Method]) -> str:
    """Return the first line of a method's file."""
    module = __import__(method.__module__, fromlist=["*"])
    return str(module.__doc__).partition("\n\n")[0].replace("\n", " ")


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def methods_table() -> str:
    """Return the table of the methods in docs/methods.md."""
    base = BaseModel("builtin")
    rows = [
        f"| `{m.name}` | {cell(m.title)} | {cell(m.equation.removeprefix('ΔW = '))} | {cell(m.trains)} | "
        f"{count(m, base, 16)} | {paper(m)} |"
        for m in METHODS
    ]
    return "\n".join(["| name | method | ΔW | trains | parameters | paper |", "|---|---|---|---|---|---|", *rows])


def papers_index() -> str:
    """Return the index of docs/papers.md."""
    rows = [f"| `{m.name}` | {cell(first_sentence(m))} | {m.paper} |" for m in METHODS]
    return "\n".join(["| name | what it does | paper |", "|---|---|---|", *rows])


def filled(page: str, table: str) -> str:
    """Return a page with the table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END, 1)[1]}"


def pages() -> dict[Path, str]:
    """Return the text that each page is to have."""
    made = {ROOT / "docs" / "methods.md": methods_table(), ROOT / "docs" / "papers.md": papers_index()}
    return {path: filled(path.read_text(), table) for path, table in made.items()} | {
        ROOT / "docs" / "recipe.md": recipe_reference(),
        FILE: flag_table(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
