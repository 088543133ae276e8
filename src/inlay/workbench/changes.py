"""Where a run changed the weights: how much, and in which part of each weight's own spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.host.peft import adapted

PART = 8  # the principal and the minor subspace are the first and the last 1/8 of the directions
MOST = 1e12  # multiplications that a CPU is asked for; beyond, the subspaces are left out


@dataclass(frozen=True)
class Change:
    """Of one weight W (out × in): ‖ΔW‖ / ‖W‖; the shares of ‖ΔW‖² that lie in the first and the last eighth of W's
    singular vectors, on its narrower side (a random change: 1/8 in each; None: not computed); the numbers trained."""

    size: float
    principal: float | None
    minor: float | None
    numbers: int
    rank: int | None


@torch.no_grad()
def changes(model: Any) -> dict[str, Change]:
    """The changes of an adapted model's weights, by module; none for a model without Inlay's layers."""
    layers = adapted(model, "default")
    cost = sum(m.in_features * m.out_features * min(m.in_features, m.out_features) for m in layers.values())
    spectra = cost <= MOST or all(m.base_layer.weight.is_cuda for m in layers.values())
    found = {}
    for layer in layers.values():
        cut, W = layer.cuts["default"], layer.pristine().float()
        D = layer.change("default", W).float()
        size = (D.norm() / W.norm()).item() if W.any() else 0.0
        principal, minor = shares(D, W) if spectra and D.any() else (None, None)
        numbers = sum(slot.weight.numel() for slot in layer.slots("default").values() if slot.weight.requires_grad)
        found[cut.module] = Change(size, principal, minor, numbers, getattr(cut.method, "r", None))
    return found


def shares(D: Tensor, W: Tensor) -> tuple[float, float]:
    """The shares of ‖D‖² in the span of the first and of the last eighth of W's singular vectors, on its narrower
    side; by the eigenvectors of its Gram matrix, in fp64."""
    if W.shape[0] > W.shape[1]:
        D, W = D.T, W.T
    D, W = D.double(), W.double()
    vectors = torch.linalg.eigh(W @ W.T).eigenvectors  # (out × out), the last has the largest σ
    part, rotated = max(1, len(vectors) // PART), (vectors.T @ D).square().sum(1)
    total = rotated.sum()
    return (rotated[-part:].sum() / total).item(), (rotated[:part].sum() / total).item()
