"""Typed fields of a dataclass: their help, their defaults, and values conformed to their types."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import MISSING, field, fields
from typing import Any, Literal

LARGEST = 2**32  # of the numbers in a recipe; beyond, libraries overflow in ways of their own


def field_of(default: Any, text: str, **meta: Any) -> Any:
    """A recipe field with its help text."""
    meta["help"] = text
    return field(default_factory=default, metadata=meta) if callable(default) else field(default=default, metadata=meta)


def default_of(f) -> Any:
    """A field's default value."""
    return f.default if f.default is not MISSING else f.default_factory()


def conform_all(filled: Any) -> None:
    """Make every field of a dataclass the type it is annotated with.

    Raises:
        ValueError: a value cannot be, or is out of bounds.
    """
    hints = typing.get_type_hints(type(filled))
    for f in fields(filled):
        value = conform(f.name, hints[f.name], getattr(filled, f.name))
        if "min" in f.metadata and isinstance(value, (int, float)) and value < f.metadata["min"]:
            raise ValueError(f"{f.name}: {value} is below {f.metadata['min']}")
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise ValueError(f"{f.name}: {value!r:.40} is beyond {LARGEST:,}")
        setattr(filled, f.name, value)


def conform(name: str, hint: Any, value: Any) -> Any:
    """`value` as the annotated type, reading what YAML or a flag may have left as text.

    Raises:
        ValueError: it is not of that type; the message says what is.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    for option in options:
        for choice in typing.get_args(option) if typing.get_origin(option) is Literal else ():
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
                raise ValueError(f"{name}: {value!r:.100} holds what is no text, number, list or mapping of names")
            return value
    raise ValueError(f"{name}: {value!r:.100} is not {' or '.join(map(describe_type, options))}")


def is_plain_value(value: Any) -> bool:
    """Whether YAML and JSON both give a value back as it is."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain_value(inner) for key, inner in value.items())
    return (
        all(map(is_plain_value, value))
        if isinstance(value, (list, tuple))
        else isinstance(value, (str, int, float, type(None)))
    )


def describe_type(option: Any) -> str:
    """A type in the words of a user."""
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    return words.get(option, "nothing" if option is type(None) else "a mapping")
