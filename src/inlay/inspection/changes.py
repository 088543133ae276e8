"""Measure where training changed the weights: how much, and in which part of each weight's own spectrum."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Conv1D

from inlay.host.adapter_state import ROOT
from inlay.host.experts import InlayExperts
from inlay.host.layer import InlayLinear, adapted
from inlay.host.module_names import layer_index, part_of
from inlay.inspection.noise_edge import effective_rank, stable_rank
from inlay.inspection.singular_values import all_singular_values, one_thread
from inlay.method import Method
from inlay.models.stored_weights import Weights

CHANGES = "changes.json"
PART = 8  # the principal and the minor subspace are the first and the last eighth of the directions
MOST = 1e12  # multiplications on a CPU; beyond it, the subspaces are left out
LEAST = 0.05  # share of a training's operations that decomposing all its weights may take
DECOMPOSED = 20  # operations for each multiplication of a weight with itself, in what `measure_change` decomposes

FIELDS = (  # of a change, each with its title and format in a table
    ("size", "‖ΔW‖ / ‖W‖", ".4f"),
    ("principal", "principal eighth", ".3f"),
    ("minor", "minor eighth", ".3f"),
    ("stable_rank", "stable rank", ".1f"),
    ("effective_rank", "eff. rank", ".1f"),
)


@dataclass(frozen=True)
class Spectrum:
    """Hold a weight's spectrum before and after training, along its k singular directions, the largest first.

    The directions are those of the weight's shorter side; `before` and `after` are σ, `shares` the share of ‖ΔW‖² in
    each direction; all (k,), fp32.
    """

    before: Tensor
    after: Tensor
    shares: Tensor


@dataclass(frozen=True)
class WeightChange:
    """Hold what training changed in one weight W (out × in).

    Attributes:
        size: ‖ΔW‖ / ‖W‖.
        principal, minor: the shares of ‖ΔW‖² in the first and the last eighth of W's singular vectors, on its shorter
            side (a random change: 1/8 in each); None: not computed, as in all of the following.
        stable_rank, effective_rank: of ΔW.
        numbers: how many parameters were trained.
        rank: the rank that was requested.
        spectrum: kept for a few weights.
    """

    size: float
    principal: float | None
    minor: float | None
    stable_rank: float | None
    effective_rank: float | None
    numbers: int
    rank: int | None
    spectrum: Spectrum | None = None


@dataclass(frozen=True)
class TrainedWeight:
    """Describe a trained weight; `read` returns W and ΔW, both (out × in), fp32."""

    read: Callable[[], tuple[Tensor, Tensor]]
    shape: torch.Size
    cuda: bool
    numbers: int
    rank: int | None = None


def changes(model: Any, base: Callable[[], Weights], spent: float | None = None) -> dict[str, WeightChange]:
    """Return the changes of a trained model's weights, by module.

    For PEFT's adapters and for a model trained whole, these are the linear layers that differ from what the checkpoint
    of the `base` stores.

    Args:
        model: the trained model.
        base: reads what its checkpoint stores.
        spent: operations of the training; where decomposing all weights would take more than a twentieth of them, only
            those of the first, the middle and the last layer are decomposed. None: all are.
    """
    layers = {layer.cuts["default"].module: layer for layer in adapted(model, "default").values()}
    if any(layer.cuts["default"].folded for layer in layers.values()):
        return {}  # a fold is compared with the adapter it began with: `inspect_adapter.changes_of_fold`
    own = {name: weight for module, layer in layers.items() for name, weight in of_inlay(module, layer).items()}
    trained = own or of_others(model, base)
    cost = sum(weight.shape.numel() * min(weight.shape) for weight in trained.values())
    full = cost <= MOST or all(weight.cuda for weight in trained.values())
    shown = chosen_modules(trained) if full else set()
    every = full and (spent is None or DECOMPOSED * cost <= LEAST * spent)
    return {name: measure_change(weight, every or name in shown, name in shown) for name, weight in trained.items()}


def of_inlay(
    module: str, layer: InlayLinear, W: Tensor | None = None, first: InlayLinear | None = None
) -> dict[str, TrainedWeight]:
    """Return the trained weight of an Inlay layer, over its own base weight or another one `W`; of experts, each one.

    For a fold, whose base W lacks ΔW(θ₀), `first` is the layer as it was before training.
    """

    def read() -> tuple[Tensor, Tensor]:
        weight = layer.pristine().float() if W is None else W
        change = layer.change("default", weight).float()
        if first is None:
            return weight, change
        piece = first.change("default", weight).float()
        return weight + piece, change - piece

    shape = torch.Size((layer.out_features, layer.in_features))
    parameters = [slot.weight for slot in layer.slots("default").values() if isinstance(slot.weight, nn.Parameter)]
    rank = rank_of(layer.cuts["default"].method)
    cuda, numbers = bool(layer.base_layer.weight.is_cuda), trained_count(parameters)
    if not isinstance(layer, InlayExperts):
        return {module: TrainedWeight(read, shape, cuda, numbers, rank)}

    def read_expert(e: int) -> tuple[Tensor, Tensor]:
        weight = (layer.pristine() if W is None else W)[e].float()
        return weight, layer.experts("default")[e].change("default", weight).float()

    methods = layer.shares["default"].methods
    return {
        f"{module}.{e}": TrainedWeight(partial(read_expert, e), shape, cuda, numbers // len(methods), rank_of(method))
        for e, method in methods.items()
    }


def rank_of(method: Method) -> int | None:
    """Return the rank of a method that has one."""
    return vars(method).get("r")


def of_others(model: Any, base: Callable[[], Weights]) -> dict[str, TrainedWeight]:
    """Return the trained weights of PEFT's layers, if they can be merged, or of a model that was trained whole."""
    kind = BaseTunerLayer if isinstance(model, PeftModel) else nn.Linear | Conv1D
    named = {name.removeprefix(ROOT): m for name, m in model.named_modules() if isinstance(m, kind)}
    linear = {
        name: m for name, m in named.items() if isinstance(unwrapped(m), nn.Linear | Conv1D) and layer_index(name) >= 0
    }
    plain = {name: m for name, m in linear.items() if unwrapped(m).weight.is_floating_point()}
    if not plain:
        return {}
    try:
        weights = base()
        merged_weight(next(iter(plain.values())))
    except (ValueError, RuntimeError, AttributeError):  # no safetensors (GGUF); an adapter without a merged form
        return {}

    def of(key: str, module: Any) -> TrainedWeight:
        def read() -> tuple[Tensor, Tensor]:
            after = merged_weight(module)
            W = weights.read(key).to(after)  # not the layer's own weight, which PEFT's PiSSA changes
            pair = (W.float(), after.float() - W.float())
            return (pair[0].T, pair[1].T) if isinstance(unwrapped(module), Conv1D) else pair

        weight = unwrapped(module).weight
        return TrainedWeight(read, weight.shape, weight.is_cuda, trained_count(module.parameters()))

    return {name: of(key, m) for name, m in plain.items() if (key := weights.key(f"{name}.weight"))}


def unwrapped(module: Any) -> Any:
    """Return a layer without the adapter around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def merged_weight(module: Any) -> Tensor:
    """Return the weight of a layer with its adapter merged in; the layer itself stays as it was."""
    base = unwrapped(module)
    weight = base.weight
    if base is module:
        return weight.detach()
    before = weight.detach().clone()
    module.merge()
    after = base.weight.detach().clone()
    module.unmerge()
    weight.data = before  # unmerging is not bit-exact
    return after


def chosen_modules(modules: Iterable[str]) -> set[str]:
    """Return the modules whose spectra are kept: one of each type in the first, the middle and the last layer."""
    layers = sorted({layer_index(name) for name in modules})
    shown = {layers[i] for i in (0, len(layers) // 2, -1)} if layers else set()
    firsts: dict[tuple[int, str], str] = {}
    for name in modules:
        firsts.setdefault((layer_index(name), part_of(name)), name)
    return {name for (layer, _), name in firsts.items() if layer in shown}


@torch.no_grad()
def measure_change(weight: TrainedWeight, full: bool = True, spectrum: bool = False) -> WeightChange:
    """Measure what training changed in one weight.

    Args:
        weight: the trained weight.
        full: also decompose W and ΔW, for the shares and the ranks.
        spectrum: also keep W's spectrum before and after.
    """
    W, D = weight.read()
    size = (D.norm() / W.norm()).item() if W.any() else 0.0
    principal = minor = stable = effective = kept = None
    if full and D.any():
        before, shares = energy_along(D, W)
        part = max(1, len(shares) // PART)
        principal, minor = shares[:part].sum().item(), shares[-part:].sum().item()
        S = all_singular_values(D)
        stable, effective = stable_rank(S), effective_rank(S)
        kept = Spectrum(before, all_singular_values(W + D), shares) if spectrum else None
    return WeightChange(size, principal, minor, stable, effective, weight.numbers, weight.rank, kept)


def trained_count(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many parameters are trained now or, in a model loaded for inference, would be in training."""
    every = list(parameters)
    return sum(p.numel() for p in [p for p in every if p.requires_grad] or every)


def energy_along(D: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Return σ of W (out × in), the largest first, and the share of ‖D‖² in each of W's singular vectors.

    The vectors are those of the shorter side, from the eigenvectors of W's Gram matrix in fp64; both results are
    (min(out, in),).
    """
    if W.shape[0] > W.shape[1]:
        D, W = D.T, W.T
    device = W.device if W.is_cuda or not torch.cuda.is_available() else torch.device("cuda")
    D, W = D.to(device, torch.float64), W.to(device, torch.float64)
    with one_thread():
        squares, vectors = torch.linalg.eigh(W @ W.T)
    energies = (vectors.T @ D).square().sum(1)
    shares = energies / energies.sum()
    return squares.clamp_min(0).sqrt().flip(0).float().cpu(), shares.flip(0).float().cpu()


def changes_as_data(changed: Mapping[str, WeightChange], spectra: bool = False) -> dict[str, Any]:
    """Return the content of changes.json, without the spectra or with them, to five digits."""

    def rounded(spectrum: Spectrum) -> dict[str, list[float]]:
        return {name: [float(f"{value:.5g}") for value in values.tolist()] for name, values in vars(spectrum).items()}

    data = {module: {k: v for k, v in vars(c).items() if k != "spectrum"} for module, c in changed.items()}
    if spectra:
        for module, change in changed.items():
            data[module]["spectrum"] = rounded(change.spectrum) if change.spectrum else None
    return data


def changes_from_data(data: Mapping[str, Mapping[str, Any]]) -> dict[str, WeightChange]:
    """Return the changes that `changes_as_data` wrote."""

    def spectrum(lists: Mapping[str, list[float]] | None) -> Spectrum | None:
        return None if lists is None else Spectrum(**{name: torch.tensor(values) for name, values in lists.items()})

    return {
        module: WeightChange(**{**values, "spectrum": spectrum(values.get("spectrum"))})
        for module, values in data.items()
    }


def by_type(changed: Mapping[str, WeightChange]) -> list[tuple[str, int, list[float | None], int]]:
    """Return each type of module with its count, the median of each of FIELDS, and its trained parameters."""
    kinds: dict[str, list[WeightChange]] = {}
    for module, change in changed.items():
        kinds.setdefault(part_of(module), []).append(change)
    return [
        (kind, len(group), [median_of(group, field) for field, _, _ in FIELDS], sum(c.numbers for c in group))
        for kind, group in kinds.items()
    ]


def median_of(changed: Iterable[WeightChange], field: str) -> float | None:
    """Return the median of a field over the changes that have it; None if none has."""
    values = [value for change in changed if (value := vars(change)[field]) is not None]
    return statistics.median(values) if values else None
