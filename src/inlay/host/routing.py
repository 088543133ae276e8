"""Which experts a model's tokens are routed to, so that the busiest can be trained alone."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from inlay.host.calibrate import MASKS, MOST, still
from inlay.host.experts import count_of, is_in_interface, some_experts


@torch.no_grad()
def routed_tokens(model: nn.Module, batches: Iterable[Any], most: int | None = MOST) -> dict[str, Tensor]:
    """Return how many tokens of `batches` are routed to each expert, (E,), by the names of the experts' modules.

    Args:
        model: the base model.
        batches: keyword arguments of the model, such as input_ids and attention_mask, which says which tokens are none.
        most: so many batches at most.

    Raises:
        ValueError: the model has no fused experts, or they are not told where their rows go.
    """
    modules = some_experts(model)
    for name, module in modules.items():
        if not is_in_interface(module):
            raise ValueError(f"experts: {name} is not told which expert a token goes to; take experts: true")
    counts = {name: torch.zeros(count_of(module), dtype=torch.long) for name, module in modules.items()}
    masks: list[Tensor] = []
    device = next(p.device for p in model.parameters())
    with still(model), ExitStack() as hooks:
        for name, module in modules.items():
            hook = partial(count_rows, counts[name], masks)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in islice(batches, most):
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            masks[:] = [batch[key].bool().flatten() for key in MASKS if batch.get(key) is not None]
            model(**batch)
    return counts


def count_rows(counts: Tensor, masks: list[Tensor], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Add the rows of each expert in one call of a module to `counts`, as a forward hook; padding is left out."""
    index = args[1] if len(args) > 1 else next(v for v in kwargs.values() if not v.is_floating_point())
    mask = next((mask for mask in masks if len(mask) == len(index)), None)
    index = index if mask is None else index[mask]
    counts += index.flatten().bincount(minlength=len(counts))[: len(counts)].cpu()


def busiest_experts(counts: dict[str, Tensor], k: int) -> dict[str, list[int]]:
    """Return the k experts of each module that got most tokens, in order: what `InlayConfig(experts=...)` takes.

    Raises:
        ValueError: a module has fewer experts.
    """
    for name, own in counts.items():
        if not 1 <= k <= len(own):
            raise ValueError(f"experts={k}: {name} has {len(own)} experts; choose 1 to {len(own)}")
    return {name: sorted(own.topk(k).indices.tolist()) for name, own in counts.items()}
