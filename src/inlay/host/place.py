"""Where in its model a weight is: its layer, its kind, its heads; for methods whose weights know of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inlay.host.module_names import layer_index, name_without_layer
from inlay.method import Method, Place

WRITERS = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "wo", "o", "fc2")  # to the residual


def places(layers: Mapping[str, tuple[int, int, Method]], config: Any) -> list[dict[str, Place]]:
    """Return the places of an adapter's weights in groups, in the model's order: those share whose methods are equal.

    Args:
        layers: out, in and method of each, by its module's name.
        config: the model's, which says how wide a head is; None where there is none.
    """
    width, numbers = head_width(config), sorted({layer_index(name) for name in layers})
    groups: dict[Any, dict[str, int]] = {}
    for name, (out, inp, method) in layers.items():
        side, other = (inp, out) if writes(name) else (out, inp)
        attention = width is not None and "att" in name.lower() and side % width == 0
        head = width if attention and width else side
        groups.setdefault((other, head, attention, repr(method)), {})[name] = side // head
    groups_of_places = []
    for group in groups.values():
        kinds = {kind: i for i, kind in enumerate(dict.fromkeys(name_without_layer(name) for name in group))}
        shared = {"layers": len(numbers), "modules": len(kinds), "most": max(group.values())}
        groups_of_places.append({
            name: Place(
                layer=numbers.index(layer_index(name)), module=kinds[name_without_layer(name)], heads=heads,
                writes=writes(name), **shared
            )
            for name, heads in group.items()
        })  # fmt: skip
    return groups_of_places


def head_width(config: Any) -> int | None:
    """Return how wide a head of a model's attention is."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    heads, hidden = (getattr(text, key, None) for key in ("num_attention_heads", "hidden_size"))
    return getattr(text, "head_dim", None) or (hidden // heads if heads and hidden else None)


def writes(name: str) -> bool:
    """Return whether a module writes to the residual stream, so that its inputs are what heads (or neurons) gave."""
    return name.rpartition(".")[2] in WRITERS
