"""Where training changed the weights: how much, and in which part of each weight's own spectrum."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Conv1D

from inlay.host.layer import InlayLinear, adapted
from inlay.host.module_names import layer_index, part_of
from inlay.inspection.noise_edge import effective_rank, stable_rank
from inlay.inspection.singular_values import all_singular_values, one_thread
from inlay.models.stored_weights import Weights

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
class WeightChange:
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


@dataclass(frozen=True)
class TrainedWeight:
    """A weight that was trained: `read` gives W and ΔW, (out × in), fp32."""

    read: Callable[[], tuple[Tensor, Tensor]]
    shape: torch.Size
    cuda: bool
    numbers: int
    rank: int | None = None


def changes(model: Any, base: Callable[[], Weights]) -> dict[str, WeightChange]:
    """The changes of a trained model's weights, by module; of PEFT's adapters and of a model trained whole, those of
    linear layers which differ from what the checkpoint of the `base` stores."""
    layers = {layer.cuts["default"].module: layer for layer in adapted(model, "default").values()}
    if any(layer.cuts["default"].folded for layer in layers.values()):
        return {}  # of a fold it is counted from the adapter it began with: `inspect_adapter.of_fold`
    ours = {module: of_ours(layer) for module, layer in layers.items()}
    every = ours or of_others(model, base)
    cost = sum(one.shape.numel() * min(one.shape) for one in every.values())
    full = cost <= MOST or all(one.cuda for one in every.values())
    shown = chosen_modules(every) if full else set()
    return {name: measure_change(one, full, name in shown) for name, one in every.items()}


def of_ours(layer: InlayLinear, W: Tensor | None = None, first: InlayLinear | None = None) -> TrainedWeight:
    """A layer of ours, over its own weight or another that is given; of a fold, whose base W lacks ΔW(θ₀), `first` is
    the layer as it was before training."""

    def read() -> tuple[Tensor, Tensor]:
        weight = layer.pristine().float() if W is None else W
        change = layer.change("default", weight).float()
        if first is None:
            return weight, change
        piece = first.change("default", weight).float()
        return weight + piece, change - piece

    size, rank = (layer.out_features, layer.in_features), getattr(layer.cuts["default"].method, "r", None)
    given = [slot.weight for slot in layer.slots("default").values() if isinstance(slot.weight, nn.Parameter)]
    return TrainedWeight(read, torch.Size(size), bool(layer.base_layer.weight.is_cuda), trained_count(given), rank)


def of_others(model: Any, base: Callable[[], Weights]) -> dict[str, TrainedWeight]:
    """The layers of PEFT's, if they can be merged; or the linear layers of a model that was trained whole."""
    kind = BaseTunerLayer if isinstance(model, PeftModel) else nn.Linear | Conv1D
    named = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, kind)}
    linear = {
        name: m for name, m in named.items() if isinstance(unwrapped(m), nn.Linear | Conv1D) and layer_index(name) >= 0
    }
    plain = {name: m for name, m in linear.items() if unwrapped(m).weight.is_floating_point()}
    if not plain:
        return {}
    try:
        weights = base()
        merged_weight(next(iter(plain.values())))
    except (ValueError, RuntimeError, AttributeError):  # no safetensors (GGUF); an adapter that has no merged form
        return {}

    def of(key: str, module: Any) -> TrainedWeight:
        def read() -> tuple[Tensor, Tensor]:
            after = merged_weight(module)
            W = weights.read(key).to(after)  # the layer's own may be another: PEFT's PiSSA cuts it
            pair = (W.float(), after.float() - W.float())
            return (pair[0].T, pair[1].T) if isinstance(unwrapped(module), Conv1D) else pair

        weight = unwrapped(module).weight
        return TrainedWeight(read, weight.shape, weight.is_cuda, trained_count(module.parameters()))

    return {name: of(key, m) for name, m in plain.items() if (key := weights.key(f"{name}.weight"))}


def unwrapped(module: Any) -> Any:
    """A layer without the adapter around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def merged_weight(module: Any) -> Tensor:
    """The weight of a layer with its adapter in it; the layer is left as it was."""
    base = unwrapped(module)
    weight = base.weight
    if base is module:
        return weight.detach()
    before = weight.detach().clone()
    module.merge()
    after = base.weight.detach().clone()
    module.unmerge()
    weight.data = before  # unmerged, it is not bit-equal
    return after


def chosen_modules(modules: Iterable[str]) -> set[str]:
    """The modules whose spectra are kept: one of each type in the first, the middle and the last layer."""
    layers = sorted({layer_index(name) for name in modules})
    few = {layers[i] for i in (0, len(layers) // 2, -1)} if layers else set()
    firsts: dict[tuple[int, str], str] = {}
    for name in modules:
        firsts.setdefault((layer_index(name), part_of(name)), name)
    return {name for (layer, _), name in firsts.items() if layer in few}


@torch.no_grad()
def measure_change(one: TrainedWeight, full: bool = True, spectrum: bool = False) -> WeightChange:
    """What training changed of a weight: `full`, by decompositions of W and of ΔW; `spectrum`, with W's before and
    after."""
    W, D = one.read()
    size = (D.norm() / W.norm()).item() if W.any() else 0.0
    principal = minor = stable = effective = kept = None
    if full and D.any():
        before, shares = energy_along(D, W)
        part, S = max(1, len(shares) // PART), all_singular_values(D)
        principal, minor = shares[:part].sum().item(), shares[-part:].sum().item()
        stable, effective = stable_rank(S), effective_rank(S)
        kept = Spectrum(before, all_singular_values(W + D), shares) if spectrum else None
    return WeightChange(size, principal, minor, stable, effective, one.numbers, one.rank, kept)


def trained_count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers are trained now or, loaded to be used, were given to train."""
    given = list(parameters)
    return sum(p.numel() for p in [p for p in given if p.requires_grad] or given)


def energy_along(D: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
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


def changes_as_data(found: Mapping[str, WeightChange], spectra: bool = False) -> dict[str, Any]:
    """What changes.json holds: everything but the spectra, or with them, five digits of each number."""

    def of(one: Spectrum | None) -> dict[str, Any] | None:
        return one and {
            name: [float(f"{value:.5g}") for value in values.tolist()] for name, values in vars(one).items()
        }

    plain = {module: {k: v for k, v in vars(c).items() if k != "spectrum"} for module, c in found.items()}
    return {m: {**told, "spectrum": of(found[m].spectrum)} for m, told in plain.items()} if spectra else plain


def changes_from_data(told: Mapping[str, Mapping[str, Any]]) -> dict[str, WeightChange]:
    """What `as_data` was given."""

    def of(one: Mapping[str, list[float]] | None) -> Spectrum | None:
        return None if one is None else Spectrum(**{name: torch.tensor(values) for name, values in one.items()})

    return {
        module: WeightChange(**{**values, "spectrum": of(values.get("spectrum"))}) for module, values in told.items()
    }


def by_type(found: Mapping[str, WeightChange]) -> list[tuple[str, int, list[float | None], int]]:
    """Of each type of module its name, how many there are, the median of each of FIELDS, and the numbers trained."""
    kinds: dict[str, list[WeightChange]] = {}
    for module, change in found.items():
        kinds.setdefault(part_of(module), []).append(change)
    return [
        (kind, len(of), [median_of(of, field) for field, _, _ in FIELDS], sum(c.numbers for c in of))
        for kind, of in kinds.items()
    ]


def median_of(of: Iterable[WeightChange], field: str) -> float | None:
    """The median of a field over those that have it; None if none has."""
    values = [value for change in of if (value := getattr(change, field)) is not None]
    return statistics.median(values) if values else None
