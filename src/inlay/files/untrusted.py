"""JSON and YAML from files that nobody vouches for, with bounds on depth, size and kinds of values."""

from __future__ import annotations

import json
from typing import Any

import yaml

# Of a YAML file: levels; values, those that an alias repeats counted again; characters.
DEPTH, SIZE, LENGTH = 50, 100_000, 1_000_000


class DamagedFileError(ValueError):
    """A file is not whole, or not what its name says."""


def from_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def from_yaml(text: str) -> Any:
    """What a YAML text holds: plain values only.

    Raises:
        yaml.YAMLError: it is none, is nested too deeply, or holds too much once its aliases are written out.
    """
    if len(text) > LENGTH:
        raise yaml.YAMLError(f"it is longer than {LENGTH:,} characters")
    values = yaml.load(text, Shallow)  # a SafeLoader: it makes plain values and runs nothing
    waiting, seen = [values], 0
    while waiting:
        value, seen = waiting.pop(), seen + 1
        if seen + len(waiting) > SIZE:
            raise yaml.YAMLError(f"it holds more than {SIZE:,} values, aliases written out")
        waiting += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return values


class Shallow(yaml.SafeLoader):
    """Follows no more than DEPTH levels, reads no more than SIZE values, and merges none into others."""

    level = seen = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.level, self.seen = self.level + 1, self.seen + 1
        if self.level > DEPTH:
            raise yaml.YAMLError(f"it is nested more than {DEPTH} levels deep")
        if self.seen > SIZE:  # to read these takes seconds already
            raise yaml.YAMLError(f"it holds more than {SIZE:,} values")
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):  # it multiplies before one could count
            raise yaml.YAMLError("it has a merge key (<<); write the values out")
        super().flatten_mapping(node)
