"""Generate JSON Schemas of recipes, comparisons and searches, by which editors complete and check YAML files."""

from __future__ import annotations

import types
import typing
from dataclasses import Field, fields
from typing import Any, Literal

from inlay.methods import every
from inlay.recipe.peft_methods import FULL, peft_method_names
from inlay.recipe.reading import hyperparameters
from inlay.recipe.recipe import Recipe
from inlay.recipe.schema import default_of, yaml_key

Schema = dict[str, Any]
KINDS = ("recipe", "compare", "tune")
TYPES: dict[object, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    str: {"type": "string"},
    list: {"type": "array"},
    dict: {"type": "object"},
    type(None): {"type": "null"},
    float: {
        "type": ["number", "string"],
        "pattern": r"^[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$",
    },  # YAML 1.1: 5e-4 is text
}


def json_schema(kind: str) -> Schema:
    """Return the JSON Schema (draft 2020-12) of a file that `inlay train`, `inlay compare` or `inlay tune` reads.

    Args:
        kind: recipe, compare or tune.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"schema {kind!r} is not one of {', '.join(KINDS)}")
    schema = fields_schema(Recipe)
    known = schema["properties"]
    known["import"] = {**known["import"], "type": ["array", "string"], "items": {"type": "string"}}
    known["args"]["properties"] = {name: {"description": text} for name, text in sorted(hyperparameters().items())}
    known["method"]["examples"] = [*(m.name for m in every()), FULL, *(f"peft:{n}" for n in peft_method_names())]
    if kind != "recipe":
        known[kind] = block_schema(kind)
        schema["required"] = [kind]
    title = {"recipe": "A recipe of inlay train", "compare": "A comparison", "tune": "A search"}[kind]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


def block_schema(kind: str) -> Schema:
    """Return the schema of the block that makes a recipe a comparison or a search."""
    from inlay.experiments.compare.spec import Comparison
    from inlay.experiments.tune.spec import Rescore, SearchSpec

    if kind == "compare":
        return fields_schema(Comparison)
    schema = fields_schema(SearchSpec)
    schema["properties"]["rescore"] |= fields_schema(Rescore)
    return schema


def fields_schema(cls: type) -> Schema:
    """Return the schema of a mapping whose keys are the fields of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {
        "type": "object",
        "properties": {yaml_key(f): field_schema(f, hints[f.name]) for f in fields(cls)},
        "additionalProperties": False,
    }


def field_schema(f: Field, hint: object) -> Schema:
    """Return the schema of one field: its types, its choices, its bound, its default and its help."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [type_schema(option) for option in (typing.get_args(hint) if union else (hint,))]
    schema = dict(kinds[0]) if len(kinds) == 1 else {"anyOf": kinds}
    if "min" in f.metadata:
        schema["minimum"] = f.metadata["min"]
    return {**schema, "default": default_of(f), "description": f.metadata["help"]}


def type_schema(option: object) -> Schema:
    """Return the schema of one type of a field."""
    if typing.get_origin(option) is Literal:
        return {"enum": list(typing.get_args(option))}
    return TYPES[option]
