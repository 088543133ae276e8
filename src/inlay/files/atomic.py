"""Write files and folders whole or not at all: under a temporary name, then one rename, by one process at a time."""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def write_text(path: Path, text: str) -> None:
    """Write `text` to the file `path` in one step, and sync it to the disk."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with part.open("x", encoding="utf-8") as file:  # fails on an existing link, which could lead elsewhere
            file.write(text)
        sync(part)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # which a write does not name
    os.replace(part, path)


def no_room(error: Exception) -> bool:
    """Return whether an error means that the disk is full, or a limit on it; libraries in Rust say so in words."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else 0
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's renames, to the disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Call `sync` on `folder` and on everything in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock on `path` against other processes until the block ends.

    The system releases the lock of a process that dies, also where processes that it forked live on. Parent folders
    created for the lock are removed again if they stay empty.

    Args:
        path: what is locked, whether it exists or not.
        wait: until another process releases the lock.

    Raises:
        ValueError: another process holds the lock and `wait` is not given, or the parent folder cannot be written.
    """
    real = path.resolve()  # one lock, whatever path leads there
    missing = [parent for parent in real.parents if not parent.exists()]
    lock = real.with_name(f".{real.name}.lock")
    try:
        try:
            real.parent.mkdir(parents=True, exist_ok=True)
            file = open_locked(lock, wait)
        except BlockingIOError:
            raise ValueError(
                f"{path} is in use by another process; wait for it to end, or choose another output"
            ) from None
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None
        with file:
            _locks.add(file)
            try:
                yield
            finally:
                _locks.discard(file)
                if not file.closed:  # as it is in a process that was forked
                    lock.unlink(missing_ok=True)
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def open_locked(lock: Path, wait: bool) -> IO[str]:
    """Open a file and lock it for this process alone; raise a BlockingIOError where another one holds it."""
    import fcntl  # Unix only; most users of this module do not lock

    while True:
        file = lock.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            file.close()
            raise
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its last holder has just removed it


_locks: set[IO[str]] = set()  # the open files of the locks that this process holds


def _close_locks() -> None:
    """Close the files of locks in a process that was forked, which would hold them when its parent is dead."""
    for file in _locks:
        file.close()
    _locks.clear()


if os.name == "posix":
    os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def new_folder(path: Path, overwrite: bool = False, marker: str = "") -> Iterator[Path]:
    """Yield a temporary sibling of `path` that becomes `path` when the block ends without an error.

    The sibling is deleted when the block fails or, if the process dies, when the next process writes there.

    Args:
        path: the folder to create.
        overwrite: replace a folder that is already there.
        marker: a file that such a folder must contain to be replaced.

    Raises:
        ValueError: something is at `path` already (see `check_free`), its parent cannot be written, or another process
            writes there.
    """
    path = path if path.name else path.absolute()  # "." has no name
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
    """Yield a temporary sibling of `path` as `new_folder` does, for a caller that holds the lock already.

    Raises:
        ValueError: it cannot be written, or the disk is full before the block ends.
    """
    try:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        part.mkdir()  # with the user's usual permissions, which mkdtemp would not give
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield part
        sync_all(part)
        set_aside(path)
        os.replace(part, path)
        sync(path.parent)
    except BaseException as error:
        put_back(path)
        if isinstance(error, Exception) and no_room(error):
            free = shutil.disk_usage(path.parent).free / 2**20
            raise ValueError(f"{path} cannot be written, with {free:,.1f} MiB free on its disk ({error})") from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def find_again(path: Path) -> Path:
    """Return `path`, where what a dead process had set aside to replace it is first put back.

    It may have set aside a folder around `path` too. Whatever cannot be put back stays where it is: another process
    holds the lock, or the disk cannot be written.
    """
    first = path
    with suppress(ValueError, OSError):
        while not first.parent.exists():
            first = first.parent
        if not first.exists() and siblings(first, "old"):
            with locked(first):
                put_back(first)
    return path


def siblings(path: Path, end: str) -> list[Path]:
    """Return the hidden siblings of `path` that this process or a dead one left, the oldest first."""
    hidden = path.parent.glob(f".{glob.escape(path.name)}.????????.{end}")
    return sorted(hidden, key=lambda sibling: sibling.stat().st_mtime_ns)


def remove_siblings(path: Path, end: str) -> None:
    """Delete the hidden siblings of `path` whose names end in `end`."""
    for sibling in siblings(path, end):
        shutil.rmtree(sibling, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Move what is at `path` to a hidden sibling, so that it is deleted only after its replacement is in place."""
    if path.exists():
        path.rename(Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name)


def put_back(path: Path) -> None:
    """Restore the folder that `set_aside` moved away, unless something new is at `path`.

    This also repairs what a process that died left behind.
    """
    for old in siblings(path, "old")[::-1]:
        if not path.exists() and (old / path.name).exists():
            (old / path.name).rename(path)
            old.rmdir()


def check_writable(folder: Path, named: Path | None = None) -> None:
    """Raise a ValueError, before work begins, where `folder` cannot be made or written into. Nothing is left there.

    `named` is what the user wrote, where that is something in the folder.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        if not there.is_dir():
            raise NotADirectoryError(None, f"{there} is a file")
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"{named or folder} cannot be written: {error.strerror}; choose another output") from None


def check_free(path: Path, overwrite: bool, marker: str) -> None:
    """Refuse a `path` that cannot be written or is in use; with `overwrite`, only one without this command's `marker`.

    Raises:
        ValueError: the path may not be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not overwrite:
            raise ValueError(f"{path} exists; choose another output or pass --overwrite")
        if not (path / marker).is_file():
            raise ValueError(f"{path} is not overwritten: it has no {marker}, so it was not made by this command")
    check_writable(path.absolute().parent, path)
