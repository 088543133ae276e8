"""Define typed fields of a dataclass: their help texts, their defaults, and values conformed to their types."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import MISSING, Field, field, fields
from typing import Any, Literal

LARGEST = 2**32  # absolute value of a number in a recipe; beyond it, libraries overflow in unclear ways


def field_of(default: Any, text: str, **meta: Any) -> Any:
    """Return a recipe field with its default, its help `text` and its bounds."""
    meta["help"] = text
    return field(default_factory=default, metadata=meta) if callable(default) else field(default=default, metadata=meta)


def yaml_key(f: Field) -> str:
    """Return the key of the field `f` in YAML: its name, unless that would be a word of Python's."""
    return f.metadata.get("key", f.name)


def default_of(f: Field) -> Any:
    """Return the default value of the field `f`."""
    return f.default_factory() if f.default_factory is not MISSING else f.default


def conform_all(filled: Any) -> None:
    """Convert every field of a dataclass to its annotated type.

    Raises:
        ValueError: a value cannot be converted, or is out of bounds.
    """
    hints = typing.get_type_hints(type(filled))
    for f in fields(filled):
        value = conform(f.name, hints[f.name], vars(filled)[f.name])
        if "min" in f.metadata and isinstance(value, (int, float)) and value < f.metadata["min"]:
            raise ValueError(f"{f.name}: {value} is below {f.metadata['min']}")
        if isinstance(value, (int, float)) and abs(value) >= LARGEST:
            raise ValueError(f"{f.name}: {value!r:.40} is beyond {LARGEST - 1:,}")
        setattr(filled, f.name, value)


def conform(name: str, hint: Any, value: Any) -> Any:
    """Return `value` as the type `hint` of the field `name`, also from the text that YAML or a flag may have left.

    Raises:
        ValueError: the value is not of that type; the message names the types that are.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            for choice in typing.get_args(option):
                if value == choice:
                    return value
        if option is type(None) and value is None:
            return None
        if option is float and not isinstance(value, bool):  # YAML reads 5e-4 as text
            try:
                if math.isfinite(float(value)):
                    return float(value)
            except (TypeError, ValueError, OverflowError):
                pass
        elif isinstance(option, type) and isinstance(value, option) and not (option is int and isinstance(value, bool)):
            if not is_plain_value(value):
                raise ValueError(f"{name}: {value!r:.100} holds more than text, numbers, lists and mappings of names")
            return value
    raise ValueError(f"{name}: {value!r:.100} is not {' or '.join(map(describe_type, options))}")


def is_plain_value(value: object) -> bool:
    """Return whether YAML and JSON both preserve `value` exactly."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain_value(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain_value, value))
    return isinstance(value, (str, int, float, type(None)))


def describe_type(option: Any) -> str:
    """Describe a type in words for users."""
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    return words.get(option, "nothing" if option is type(None) else "a mapping")
