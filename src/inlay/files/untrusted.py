"""Open files that anybody may have written, and read JSON and YAML with bounds on depth, size and kinds of values."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

# Limits of a YAML file: its levels, its values (those that an alias repeats count again), its characters.
DEPTH = 50
SIZE = 100_000
LENGTH = 1_000_000

INT, FLOAT = NUMBER_TAGS = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class DamagedFileError(ValueError):
    """Report a file that is incomplete, or not what its name says."""


def user_path(path: str | Path) -> Path:
    """Return a path as a user wrote it, with ~ as the home folder; where nobody knows that, ~ is a name like others."""
    return Path(os.path.expanduser(path))


def regular_file(path: Path) -> Path:
    """Return `path`; whatever reads a file of a user's asks for it here, as a pipe blocks and a device never ends.

    A file that is missing is for the reader to report, and so is a folder.

    Raises:
        ValueError: the path leads to a pipe, a device or a socket, or is longer than a name may be.
    """
    try:
        mode = path.stat().st_mode
    except ValueError:  # it is no name of a file
        return path
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{str(path)[:60]}...: {error.strerror}; give the name of a file") from None
        return path  # it is missing
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DamagedFileError(f"{path} is a pipe, a device or a socket, which are not read; give a regular file")
    return path


def regular_files(folder: Path) -> Path:
    """Return `folder` for a library that reads files in it; refuse it where `regular_file` refuses one of them."""
    for path in folder.rglob("*"):
        regular_file(path)
    return folder


def read_regular(path: Path, most: int = -1) -> str:
    """Return the UTF-8 text of a file, or its first `most` characters.

    Raises:
        ValueError: it is no `regular_file`, or not UTF-8.
        OSError: it cannot be read.
    """
    with regular_file(path).open(encoding="utf-8") as file:
        return file.read(most)


def from_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def from_yaml(text: str) -> Any:
    """Parse a YAML text that holds plain values only.

    Raises:
        yaml.YAMLError: it is not YAML, is nested too deeply, or holds too much once its aliases are written out.
    """
    if len(text) > LENGTH:
        raise yaml.YAMLError(f"it is longer than {LENGTH:,} characters")
    values = yaml.load(text, Shallow)  # a SafeLoader makes plain values and runs nothing
    waiting = [values]
    seen = 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen + len(waiting) > SIZE:
            raise yaml.YAMLError(f"it holds more than {SIZE:,} values, aliases written out")
        waiting += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return values


class Shallow(yaml.SafeLoader):
    """Load YAML of at most DEPTH levels and SIZE values, without merge keys and without a key that stands twice.

    Numbers are those of YAML 1.2: 1e-3 is one, 1:30 is text and not 90, and 010 is text and not 8.
    """

    level = 0
    seen = 0
    yaml_implicit_resolvers = {
        start: [pair for pair in pairs if pair[0] not in NUMBER_TAGS]
        for start, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.level += 1
        self.seen += 1
        if self.level > DEPTH:
            raise yaml.YAMLError(f"it is nested more than {DEPTH} levels deep")
        if self.seen > SIZE:  # reading so many takes seconds already
            raise yaml.YAMLError(f"it holds more than {SIZE:,} values")
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(
            key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value
        ):  # it multiplies values before they can be counted
            raise yaml.YAMLError("it has a merge key (<<); write the values out")
        super().flatten_mapping(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        made = super().construct_mapping(node, deep)
        if len(made) < len(node.value):  # the first of the two would be lost
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            line = next(key.start_mark.line for key, _ in node.value[::-1] if self.construct_object(key) == twice)
            raise yaml.YAMLError(f"it has the key {twice!r:.60} twice in one mapping (again in line {line + 1})")
        return made


WHOLE = r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)"
REAL = (
    r"[-+]?((\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)
Shallow.add_implicit_resolver(INT, re.compile(f"({WHOLE})$"), list("-+0123456789"))
Shallow.add_implicit_resolver(FLOAT, re.compile(f"({REAL})$"), list("-+.0123456789"))
