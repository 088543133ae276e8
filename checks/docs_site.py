"""Let mkdocs build the site from pages that also read well on GitHub: mkdocs runs this as a hook (`make docs`).

README.md is the first page. What a page links to outside of docs/ becomes a page of the site, under repository/: pages
as they are, sources as a block of code, folders as a list of their files, and everything else as a file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")
FENCE = re.compile(r"^```(\w+) (?!{)([^\n\"]+)$", re.MULTILINE)
SOURCES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".txt": "text", "": "text"}
SKIPPED = {"__pycache__"}


def place(path: Path) -> str:
    """Return where a file or folder of the repository lies in the site's sources."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_dir():
        return place(path / "README.md")
    name = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
    if path.is_relative_to(DOCS):
        return name
    return f"repository/{name}.md" if path.suffix in SOURCES else f"repository/{name}"


def target(link: str, page: Path) -> Path | None:
    """Return the file or folder of the repository that a link names, or None."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = Path(os.path.normpath(page.parent / link))
    return path if path.exists() and path.is_relative_to(ROOT) else None


def prose(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[Path]:
    """Return the files of the repository that a page links to."""
    found = (target(link[1], page) for link in LINK.findall(prose(page.read_text(encoding="utf-8"))))
    return [path for path in found if path is not None]


def inside(folder: Path) -> list[Path]:
    """Return what a page about a folder lists."""
    return [path for path in sorted(folder.iterdir()) if path.name not in SKIPPED and not path.name.startswith(".")]


def content(path: Path) -> str:
    """Return the text of a page that the site makes of a source file, or of a folder without a README."""
    if path.suffix == ".md" and path.exists():
        return path.read_text(encoding="utf-8")
    if path.name == "README.md":
        names = [f"- [{p.name}]({p.name})" for p in inside(path.parent)]
        return f"# {path.parent.relative_to(ROOT)}\n\n" + "\n".join(names) + "\n"
    code = path.read_text(encoding="utf-8")
    return f"# {path.relative_to(ROOT)}\n\n````{SOURCES[path.suffix]}\n{code.rstrip()}\n````\n"


_pages: dict[str, Path] = {}  # each page of the site and the file of the repository that it is made of


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/ that are linked to, from one to the next."""
    waiting = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    while waiting:
        path = waiting.pop()
        if path.is_dir():
            path = path / "README.md"
        name = place(path)
        if name in _pages:
            continue
        _pages[name] = path
        is_page = name.endswith(".md")
        if is_page and (path.suffix == ".md"):
            waiting += links(path) if path.exists() else inside(path.parent)
        if name in files.src_uris:
            continue
        if is_page:
            files.append(File.generated(config, name, content=content(path)))
        elif path.is_file():
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the pages of the site, and give blocks of code the name of the file that they show."""
    path = _pages[page.file.src_uri]
    if path.suffix in SOURCES:
        return markdown

    def moved(found: re.Match[str]) -> str:
        path_found = target(found[2], path)
        if path_found is None:
            return found[0]
        there = os.path.relpath(place(path_found), Path(page.file.src_uri).parent)
        return found[1] + Path(there).as_posix() + found[3]

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    markdown = "".join(p if i % 2 else LINK.sub(moved, p) for i, p in enumerate(parts))
    methods = (ROOT / "src/inlay/methods/__init__.py").read_text(encoding="utf-8")
    listed = "\n\n".join(f"::: {name}" for name in re.findall(r"^from (inlay\.methods\.\w+)", methods, re.MULTILINE))
    return FENCE.sub(r'```\1 title="\2"', markdown).replace("<!-- every method -->", listed)
