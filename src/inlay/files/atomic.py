"""Writing so that nothing is ever half there: to a temporary name, then one rename; and by one process at a time.

And reading what anybody may have written: JSON and YAML that is nested or grows without end is refused, not followed.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def write_text(path: Path, text: str) -> None:
    """Write a text file at once, and onto the disk."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with part.open("x", encoding="utf-8") as file:  # never through a link that somebody put there
        file.write(text)
    sync(part)
    os.replace(part, path)


def sync(path: Path) -> None:
    """Have what was written to a file, or renamed in a folder, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """`sync` for a folder and all that is in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes until the block ends. Of a process that dies, the system lets go itself.

    Of the parents made for it, none stays empty.

    Raises:
        ValueError: another process holds it, or its parent cannot be written.
    """
    real = path.resolve()  # by whatever name it is called
    missing = [parent for parent in real.parents if not parent.exists()]
    lock = real.with_name(f".{real.name}.lock")
    try:
        try:
            real.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None
        with file:
            take_lock(file, path)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def take_lock(lock: IO[str], path: Path) -> None:
    """Lock an open file, for the process alone, or raise the ValueError of `locked`."""
    import fcntl  # not everything that writes files needs a system that has it

    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock.fileno()).st_nlink:  # else who held it has just removed it
            return
    raise ValueError(f"{path} is in use by another process; wait for it to end, or choose another output")


@contextmanager
def new_folder(path: Path, overwrite: bool = False, marker: str = "") -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends well, and vanishes when it does not, or, if the
    process dies, when the next one writes there.

    Raises:
        ValueError: something is at `path` already (see `check_free`), its parent cannot be written, or another process
            writes there.
    """
    path = path if path.name else path.absolute()  # as "." has none
    check_free(path, overwrite, marker)
    with locked(path):
        put_back(path)
        check_free(path, overwrite, marker)
        remove_siblings(path, "part")
        with staged(path) as part:
            yield part
        remove_siblings(path, "old")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """`new_folder` for who holds `path` already and sees to what there was."""
    try:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        part.mkdir()  # with the rights that the user gives to folders
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield part
        sync_all(part)
        set_aside(path)
        os.replace(part, path)
        sync(path.parent)
    except BaseException:
        put_back(path)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def siblings(path: Path, end: str) -> list[Path]:
    """The hidden siblings of `path` that this process, or one that died, has made; the oldest first."""
    found = path.parent.glob(f".{glob.escape(path.name)}.????????.{end}")
    return sorted(found, key=lambda sibling: sibling.stat().st_mtime_ns)


def remove_siblings(path: Path, end: str) -> None:
    """Remove them."""
    for sibling in siblings(path, end):
        shutil.rmtree(sibling, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Move what is at `path` to a hidden sibling, so that it is lost only once there is something in its place."""
    if path.exists():
        path.rename(Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name)


def put_back(path: Path) -> None:
    """Undo that, where nothing has come to `path`, here or in a process that died."""
    for old in siblings(path, "old")[::-1]:
        if not path.exists() and (old / path.name).exists():
            (old / path.name).rename(path)
            old.rmdir()


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
