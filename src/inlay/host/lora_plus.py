"""LoRA+: the outer factor of a product learns faster than the inner one.

Hayou, Ghosh, Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354: with one rate for both
wide layers learn their features too slowly; lr_B = λ lr_A with λ well above 1 (about 16) mends that. Which tensor is
which is said by its method (`Method.roles`), never by its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from inlay.host.layer import InlayLinear


def parameter_groups(model: nn.Module, lr: float, lr_ratio: float) -> list[dict[str, Any]]:
    """Return the trained parameters of `model` as groups of an optimiser: `AdamW(parameter_groups(model, 2e-4, 16))`.

    Args:
        model: adapted.
        lr: the rate of all but the outer factors.
        lr_ratio: λ; outer factors have the rate λ lr.

    Raises:
        ValueError: λ is not above 0, or nothing trained is a pair of an inner and an outer factor.
    """
    return raised([{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}], model, lr_ratio)


def raised(groups: Iterable[dict[str, Any]], model: nn.Module, lr_ratio: float) -> list[dict[str, Any]]:
    """Return an optimiser's groups, the outer factors of each in a group of their own at `lr_ratio` times its rate."""
    if lr_ratio <= 0:
        raise ValueError(f"lr_ratio={lr_ratio} is not above 0")
    role = {p: part for m in model.modules() if isinstance(m, InlayLinear) for p, part in m.roles() if p.requires_grad}
    if not {"in", "out"} <= set(role.values()):
        raise ValueError(
            f"lr_ratio={lr_ratio} is between an inner and an outer factor, and this model trains no such pair; "
            "set the learning rate itself"
        )
    divided = []
    for group in groups:
        inner, outer = ([p for p in group["params"] if (role.get(p) == "out") is out] for out in (False, True))
        divided += [{**group, "params": inner}] if inner or not outer else []
        divided += [{**group, "params": outer, "lr": group["lr"] * lr_ratio}] if outer else []
    return divided
