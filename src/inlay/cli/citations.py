"""BibTeX of the methods' papers, from the line of a method's file that names authors, year, title and arXiv number."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from inlay.method import Method

CITATION = re.compile(r'^(\w[^\n"]*?) (20\d\d), "([^"]+)",\s+arXiv\s+(\d{4}\.\d{4,5})', re.MULTILINE)


def bibtex(methods: Iterable[type[Method]], only: str | None = None) -> str:
    """Return an entry for each paper of `methods`, in their order; methods of one paper share its entry.

    With the name of a method in `only`, it is the entry of its paper alone.

    A method's module says `Authors year, "Title", arXiv number` in its docstring; one of several of a paper is enough.
    """
    papers: dict[str, tuple[list[str], re.Match[str]]] = {}
    for method in methods:
        number = re.search(r"arXiv (\d{4}\.\d{4,5})", method.paper)
        found = CITATION.search(sys.modules[method.__module__].__doc__ or "")
        if number and found and found[4] == number[1]:
            papers.setdefault(number[1], ([], found))
    for method in methods:
        for number, (names, _) in papers.items():
            names += [method.name] if number in method.paper else []
    chosen = {number: entry for number, entry in papers.items() if only is None or only in entry[0]}
    return "\n\n".join(bibtex_entry(number, names, found) for number, (names, found) in chosen.items())


def bibtex_entry(number: str, names: list[str], found: re.Match[str]) -> str:
    """Return one paper's entry, whose key is the first method's name; `et al.` becomes `and others`."""
    surnames, others = found[1].strip().removesuffix(" et al."), found[1].strip().endswith("et al.")
    authors = " and ".join([*surnames.split(", "), *(["others"] if others else [])])
    lines = [
        f"  title = {{{{{' '.join(found[3].split())}}}}}",
        f"  author = {{{authors}}}",
        f"  year = {{{found[2]}}}",
        f"  eprint = {{{number}}}",
        "  archivePrefix = {arXiv}",
        f"  note = {{Inlay: {', '.join(names)}}}",
    ]
    return f"@misc{{{names[0]},\n" + ",\n".join(lines) + "\n}"
