"""Learning rates by role: LoRA+ lets the outer factor of a product learn faster than the inner one; cores may too.

Hayou, Ghosh, Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354: with one rate for both
wide layers learn their features too slowly; lr_B = λ lr_A with λ well above 1 (about 16) mends that. Which tensor is
which is said by its method (`Method.roles`), never by its name. The same of cores, such as LaMDA's S, is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from inlay.host.layer import InlayLinear

# By the role that has a rate of its own: the name of its ratio, and the roles that must be trained for it to mean any.
RATIOS = {
    "out": ("lr_ratio", {"in", "out"}, "an inner and an outer factor"),
    "core": ("core_ratio", {"core", "out"}, "a core and an outer factor"),
}


def parameter_groups(
    model: nn.Module, lr: float, lr_ratio: float | None = None, core_ratio: float | None = None
) -> list[dict[str, Any]]:
    """Return the trained parameters of `model` as groups of an optimiser: `AdamW(parameter_groups(model, 2e-4, 16))`.

    Args:
        model: adapted.
        lr: the rate of all that has no ratio.
        lr_ratio: LoRA+'s λ; outer factors (B) have the rate λ lr.
        core_ratio: the same for cores between two factors (LaMDA's S).

    Raises:
        ValueError: a ratio is not above 0, or nothing trained is a pair of the two that it is between.
    """
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]
    return raised(groups, model, role_ratios(lr_ratio, core_ratio))


def role_ratios(lr_ratio: float | None, core_ratio: float | None) -> dict[str, float]:
    """Return the ratios that are set, by the role that has them."""
    return {role: ratio for role, ratio in (("out", lr_ratio), ("core", core_ratio)) if ratio is not None}


def raised(groups: Iterable[dict[str, Any]], model: nn.Module, ratios: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return an optimiser's groups, each role of `ratios` in groups of its own at so many times the rate.

    Raises:
        ValueError: a ratio is not above 0, or nothing trained is a pair of the two that it is between.
    """
    role = {p: part for m in model.modules() if isinstance(m, InlayLinear) for p, part in m.roles() if p.requires_grad}
    for part, ratio in ratios.items():
        name, pair, words = RATIOS[part]
        if ratio <= 0:
            raise ValueError(f"{name}={ratio} is not above 0")
        if not pair <= set(role.values()):
            raise ValueError(
                f"{name}={ratio} is between {words}, and this model trains no such pair; set the learning rate itself"
            )
    divided = []
    for group in groups:
        parts: dict[str | None, list[nn.Parameter]] = {None: [], **{part: [] for part in ratios}}
        for p in group["params"]:
            part = role.get(p)
            parts[part if part in ratios else None].append(p)
        rates = {part: {"lr": group["lr"] * ratio} for part, ratio in ratios.items()}
        kept = {part: of for part, of in parts.items() if of} or {None: []}
        divided += [{**group, "params": of, **rates.get(part or "", {})} for part, of in kept.items()]
    return divided
