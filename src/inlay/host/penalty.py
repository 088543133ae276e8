"""A method's penalty on θ (KaSA keeps its vectors orthogonal), for our trainers and for a loop written by hand.

The gradient of the penalty is added to what the backward pass of the last micro-batch left, before it is clipped: once
per optimiser step, whatever the accumulation. All processes hold the same θ and add the same, so nothing is exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inlay.host import distributed
from inlay.host.layer import InlayLinear, widen


def penalised(model: nn.Module) -> list[tuple[InlayLinear, str]]:
    """Return the layers with an active adapter whose method has a penalty, each with the adapter's name."""
    layers = [m for m in model.modules() if isinstance(m, InlayLinear)]
    active = [(layer, name) for layer in layers for name in layer.active_adapters if name in layer.cuts]
    return [(layer, name) for layer, name in active if layer.cuts[name].method.penalises]


def penalty(model: nn.Module) -> Tensor | None:
    """Return what a training adds to the loss of `model` once per step; None where no active adapter has a penalty.

    It is the mean over the adapted weights (of which each expert is one):
    `loss = model(**batch).loss + inlay.penalty(model)`.

    Args:
        model: adapted.
    """
    terms = []
    for layer, name in penalised(model):
        for method, p in layer.parts_of(name):
            terms.append(method.penalty(widen({k: distributed.borrowed(v) for k, v in p.items()})))
    return torch.stack([term.to(terms[0].device) for term in terms]).mean() if terms else None


def add_penalty(model: nn.Module, scale: float = 1.0) -> float | None:
    """Add the gradient of `penalty`, times `scale`, to those of the trained parameters; return the penalty's value."""
    value = penalty(model)
    if value is None:
        return None
    trained = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(value, trained, allow_unused=True)
    with torch.no_grad():
        for p, slope in zip(trained, slopes, strict=True):
            if slope is not None:
                p.grad = scale * slope if p.grad is None else p.grad.add_(slope, alpha=scale)
    return value.item()
