"""Where training changed the weights: how much, and in which part of each weight's own spectrum."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.host.layer import InlayLinear
from inlay.host.peft import adapted
from inlay.workbench.edge import effective_rank, stable_rank
from inlay.workbench.ranks import depth, part_of
from inlay.workbench.spectra import one_thread, singular_values

CHANGES = "changes.json"
PART = 8  # the principal and the minor subspace are the first and the last 1/8 of the directions
MOST = 1e12  # multiplications that a CPU is asked for; beyond, the subspaces are left out


FIELDS = (  # of a change, with its name and form in a table
    ("size", "‖ΔW‖ / ‖W‖", ".4f"),
    ("principal", "principal eighth", ".3f"),
    ("minor", "minor eighth", ".3f"),
    ("stable_rank", "stable rank", ".1f"),
    ("effective_rank", "eff. rank", ".1f"),
)


@dataclass(frozen=True)
class Spectrum:
    """A weight along its k singular directions, the largest first, on its narrower side: σ before and after training,
    and the share of ‖ΔW‖² in each direction; all (k,), fp32."""

    before: Tensor
    after: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Change:
    """Of one weight W (out × in): ‖ΔW‖ / ‖W‖; the shares of ‖ΔW‖² that lie in the first and the last eighth of W's
    singular vectors, on its narrower side (a random change: 1/8 in each), the stable and the effective rank of ΔW (all
    four None: not computed); the numbers trained; the rank asked for; its spectrum, of a few weights."""

    size: float
    principal: float | None
    minor: float | None
    stable_rank: float | None
    effective_rank: float | None
    numbers: int
    rank: int | None
    spectrum: Spectrum | None = None


def changes(model: Any) -> dict[str, Change]:
    """The changes of an adapted model's weights, by module; none for a model without Inlay's layers."""
    layers = {layer.cuts["default"].module: layer for layer in adapted(model, "default").values()}
    cost = sum(m.in_features * m.out_features * min(m.in_features, m.out_features) for m in layers.values())
    full = cost <= MOST or all(m.base_layer.weight.is_cuda for m in layers.values())
    shown = chosen(layers) if full else set()
    return {name: measure(m, m.pristine().float(), full, name in shown) for name, m in layers.items()}


def chosen(modules: Iterable[str]) -> set[str]:
    """The modules whose spectra are kept: one of each type in the first, the middle and the last layer."""
    layers = sorted({depth(name) for name in modules})
    few = {layers[i] for i in (0, len(layers) // 2, -1)} if layers else set()
    firsts: dict[tuple[int, str], str] = {}
    for name in modules:
        firsts.setdefault((depth(name), part_of(name)), name)
    return {name for (layer, _), name in firsts.items() if layer in few}


@torch.no_grad()
def measure(layer: InlayLinear, W: Tensor, full: bool = True, spectrum: bool = False) -> Change:
    """What the adapter "default" of a layer changes of its weight W (out × in, fp32): `full`, by decompositions of W
    and of ΔW; `spectrum`, with W's before and after."""
    cut, D = layer.cuts["default"], layer.change("default", W).float()
    size = (D.norm() / W.norm()).item() if W.any() else 0.0
    principal = minor = stable = effective = kept = None
    if full and D.any():
        before, shares = along(D, W)
        part, S = max(1, len(shares) // PART), singular_values(D)
        principal, minor = shares[:part].sum().item(), shares[-part:].sum().item()
        stable, effective = stable_rank(S), effective_rank(S)
        kept = Spectrum(before, singular_values(W + D), shares) if spectrum else None
    rank = getattr(cut.method, "r", None)
    return Change(size, principal, minor, stable, effective, numbers(layer), rank, kept)


def numbers(layer: InlayLinear) -> int:
    """How many numbers a layer trains now or, loaded to be used, was given to train."""
    given = [slot.weight for slot in layer.slots("default").values() if isinstance(slot.weight, nn.Parameter)]
    return sum(p.numel() for p in [p for p in given if p.requires_grad] or given)


def along(D: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """σ of W (out × in), the largest first, and the share of ‖D‖² in each of its singular vectors on its narrower side;
    both (min(out, in),), by the eigenvectors of W's Gram matrix, in fp64."""
    if W.shape[0] > W.shape[1]:
        D, W = D.T, W.T
    device = W.device if W.is_cuda or not torch.cuda.is_available() else torch.device("cuda")
    D, W = D.to(device, torch.float64), W.to(device, torch.float64)
    with one_thread():
        squares, vectors = torch.linalg.eigh(W @ W.T)
    energies = (vectors.T @ D).square().sum(1)
    shares = energies / energies.sum()
    return squares.clamp_min(0).sqrt().flip(0).float().cpu(), shares.flip(0).float().cpu()


def as_data(found: Mapping[str, Change]) -> dict[str, Any]:
    """What changes.json holds: everything but the spectra."""
    return {module: {k: v for k, v in vars(c).items() if k != "spectrum"} for module, c in found.items()}


def by_type(found: Mapping[str, Change]) -> list[tuple[str, int, list[float | None], int]]:
    """Of each type of module its name, how many there are, the median of each of FIELDS, and the numbers trained."""
    kinds: dict[str, list[Change]] = {}
    for module, change in found.items():
        kinds.setdefault(part_of(module), []).append(change)
    return [
        (kind, len(of), [median(of, field) for field, _, _ in FIELDS], sum(c.numbers for c in of))
        for kind, of in kinds.items()
    ]


def median(of: Iterable[Change], field: str) -> float | None:
    """The median of a field over those that have it; None if none has."""
    values = [value for change in of if (value := getattr(change, field)) is not None]
    return statistics.median(values) if values else None
