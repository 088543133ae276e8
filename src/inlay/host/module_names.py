"""What a module's dotted name says: its layer, its type, its part."""

from __future__ import annotations

import re

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of compile, FSDP, checkpointing


def without_wrappers(name: str) -> str:
    """Return a module's name without the parts that torch.compile, FSDP and activation checkpointing add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS) if "_" in name else name


def any_of(words: list[str]) -> str:
    """Return a regex for one of several words without special characters."""
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def split_name(name: str) -> tuple[str, str, str]:
    """Split a module's name into the parts before, at and after its layer's index, the first number in it."""
    match = re.match(r"(|.*?\.)(\d+)(\..*|)$", name)
    return (match[1], match[2], match[3]) if match else (name, "", "")


def part_of(name: str) -> str:
    """Return a module's name within its layer, the same for all experts of one kind."""
    head, _, tail = split_name(name)
    return re.sub(r"\.\d+(?=\.|$)", "", tail.strip(".") or head.strip("."))


def last_part(name: str) -> str:
    """Return the last component of a module's name, such as "q_proj"."""
    return name.rpartition(".")[2]


def layer_index(name: str) -> int:
    """Return the number of a module's layer, the first among the components of its name; −1 where there is none."""
    return int(split_name(name)[1] or -1)


def name_without_layer(name: str) -> str:
    """Return a module's name without its layer's number."""
    return re.sub(r"(^|\.)\d+(\.|$)", r"\1*\2", name, count=1)
