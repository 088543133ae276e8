"""NaN and Inf in a step: which gradients hold them, and which module gave them first."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from inlay.host import distributed
from inlay.training.trainers.deepspeed_zero3 import gathered_gradients


def bad_gradients(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradient holds NaN or Inf.

    These spread backwards, so the last name is nearest to where they come from.
    """
    parts = (
        gathered_gradients(model)
        if distributed.deepspeed()
        else [(name, p.grad) for name, p in model.named_parameters()]
    )
    own = [(name.removeprefix("module."), distributed.own_shard(grad)) for name, grad in parts if grad is not None]
    own = [(name, grad) for name, grad in own if grad.numel()]  # a process may hold no part of a small tensor
    if not own:
        return []
    largest = nn.utils.get_total_norm([grad for _, grad in own], math.inf)  # a few kernels, and one wait for a GPU
    return [] if largest.isfinite() else [name for name, grad in own if not grad.isfinite().all()]


@torch.no_grad()
def first_bad_output(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """Return the first module, innermost, whose output on a batch holds NaN or Inf."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
