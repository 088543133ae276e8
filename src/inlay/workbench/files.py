"""Writing so that nothing is ever half there: to a temporary name, then one rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file at once."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextmanager
def new_folder(path: Path, overwrite: bool = False, marker: str = "") -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        ValueError: something is at `path` already (see `check_free`), or its parent cannot be written.
    """
    check_free(path, overwrite, marker)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield part
        part.chmod(0o755)
        old = set_aside(path)
        os.replace(part, path)
        if old:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def set_aside(path: Path) -> Path | None:
    """Move what is at `path` to a hidden sibling, so that it is lost only once there is something in its place."""
    if not path.exists():
        return None
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    return path.rename(old / path.name).parent


def check_free(path: Path, overwrite: bool, marker: str) -> None:
    """Refuse a path that is in use; even with `overwrite`, one without the `marker` that this command leaves.

    Raises:
        ValueError: the path may not be written.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{path} exists; choose another output or pass --overwrite")
    if not (path / marker).is_file():
        raise ValueError(f"{path} is not overwritten: it has no {marker}, so it was not made by this command")
