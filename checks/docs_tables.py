"""Write the tables of docs/ that the package itself can tell, llms.txt and AGENTS.md: `make docs-tables`.

A method's row comes from its class, its number of trained parameters from the built-in model's shapes.
"""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

from inlay.cli.entry import parser
from inlay.cli.flags import FILE
from inlay.cli.list_methods import count
from inlay.cli.parser import first_sentence as verb_sentence
from inlay.cli.recipe_reference import flag_table, recipe_reference
from inlay.method import Method
from inlay.methods import METHODS
from inlay.models.base import BaseModel
from inlay.recipe.rates import rates_table

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


def filled(page: str, tables: list[str]) -> str:
    """Return a page with each of the tables between its marks, in order."""
    made, *rest = page.split(BEGIN)
    for table, text in zip(tables, rest, strict=True):
        made += f"{BEGIN}\n\n{table}\n\n{END}{text.split(END, 1)[1]}"
    return made


def verbs() -> list[tuple[str, str, str]]:
    """Return each verb with what it does in a sentence, and its first example."""
    made = parser().verbs.items()
    return [(name, verb_sentence(v.description or ""), v.example.strip().splitlines()[0].strip()) for name, v in made]


def habits() -> list[tuple[str, str]]:
    """Return the targets of the Makefile, and what each is for."""
    return re.findall(r"^([a-z-]+):[^\n]*?## (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def documents() -> list[tuple[str, str]]:
    """Return the pages of docs/ by their address, with their titles."""
    paths = sorted((ROOT / "docs").glob("*.md"))
    return [(f"docs/{path.name}", path.read_text().partition("\n")[0].removeprefix("# ")) for path in paths]


CODES = """
Exit codes: 0 done, 2 a mistake in what was given (one line), 1 a fault of Inlay's, 130 interrupted, 3 trained and
saved, and something after that failed. `--json` prints JSON (methods, plan, inspect, eval, env). `inlay schema` prints
the JSON Schema of a recipe.

## Docs

- [The first five minutes](README.md)
"""
MADE = """# For agents that work on Inlay

Made by `make docs-tables`; edit what it is made of. [CONTRIBUTING](CONTRIBUTING.md) has the rooms of the package, which
imports go where, the style and how to add a method; [tests/README](tests/README.md) says which test is where. One test
file: `.venv/bin/python -m pytest tests/methods/test_methods.py -k lora`. Warnings are errors.

| command of the repository | what it does |
|---|---|
"""


def llms_page() -> str:
    """Return llms.txt (llmstxt.org): what Inlay is, its verbs, and where to read more."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = ["# Inlay", "", f"> {project['description']}", "", "## Commands", ""]
    lines += [f"- `inlay {name}`: {does} Example: `{example}`" for name, does, example in verbs()]
    lines += [CODES.rstrip(), *(f"- [{title}]({path})" for path, title in documents())]
    return "\n".join([*lines, ""])


def agents_page() -> str:
    """Return AGENTS.md: what an agent that works on this repository needs, from the same sources."""
    lines = [MADE + "\n".join(f"| `make {name}` | {does} |" for name, does in habits()), ""]
    lines += ["| command of the package | what it does |", "|---|---|"]
    lines += [f"| `inlay {name}` | {cell(does)} |" for name, does, _ in verbs()]
    return "\n".join([*lines, ""])


def pages() -> dict[Path, str]:
    """Return the text that each page is to have."""
    made = {
        ROOT / "docs" / "methods.md": [rates_table(), methods_table()],
        ROOT / "docs" / "papers.md": [papers_index()],
    }
    pictures = runpy.run_path(str(ROOT / "checks" / "docs_pictures.py"))["pictures"]()
    return {path: filled(path.read_text(), tables) for path, tables in made.items()} | {
        ROOT / "docs" / "recipe.md": recipe_reference(),
        FILE: flag_table(),
        **pictures,
        ROOT / "llms.txt": llms_page(),
        ROOT / "AGENTS.md": agents_page(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
