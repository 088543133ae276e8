"""Compute the singular values of a model's weights, one weight in memory at a time, and cache them by content.

They come from the eigenvalues of the short side's Gram matrix in fp64: σ is right to about 1e-8 of the largest one,
where `svdvals` in fp32 has 1e-7 and rounds the small ones away (at a condition number of 6e5 a relative error of 6e-5,
against 8e-7), in no more time (a 576 × 1536 weight 0.03 s, 2048 × 2048 0.5 s against 1.2 s, one core). The eigenvalues
are left to one thread: two are no faster, and on cores that others use they wait for each other (6 s for 0.03 s).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from tqdm import tqdm

from inlay.conversion.stored_experts import ExpertFiles
from inlay.files import cache
from inlay.host.config import InlayConfig
from inlay.host.experts import ExpertWeight, InlayExperts, expert_weights, fused_experts
from inlay.host.layer import adapted
from inlay.models.base import BaseModel
from inlay.models.stored_weights import Weights

Shape = tuple[int, int]  # out, in


def target_weights(base: BaseModel, config: InlayConfig, **model: Any) -> dict[str, Shape]:
    """Return the weights of a model that a config adapts, in order, with their (out, in); none is read.

    They go by the names of their modules; experts by that of their parameter and their number, as in `patterns`.

    Args:
        base: the model.
        config: of the adapter.
        model: further arguments of `BaseModel.meta`: its class, its settings.

    Raises:
        ValueError: the model or the config cannot be used, or they do not fit each other.
    """
    config = copy.deepcopy(config)  # PEFT writes what it finds into it
    empty = get_peft_model(base.meta(torch.float32, **model), config)
    shapes: dict[str, Shape] = {}
    for layer in adapted(empty, "default").values():
        name, shape = layer.cuts["default"].module, (layer.out_features, layer.in_features)
        experts = isinstance(layer, InlayExperts)
        shapes |= {f"{name}.{e}": shape for e in layer.shares["default"].methods} if experts else {name: shape}
    return shapes


def weight_spectra(base: BaseModel, shapes: Mapping[str, Shape], **model: Any) -> dict[str, Tensor]:
    """Return the singular values of each named weight: fp32 (min(out, in),), descending, on the CPU.

    Args:
        base: the model.
        shapes: of the weights, by the names that `target_weights` gives them.
        model: as for `target_weights`.

    Raises:
        ValueError: the checkpoint lacks a weight, stores it quantised or in another shape, or it holds NaN or Inf.
    """
    weights = base.weights(**model)
    experts = stored_parameters(weights, shapes)
    spectra: dict[str, Tensor] = {}
    for name in tqdm(shapes, desc="Spectra", unit="weight", disable=None, delay=1):
        parameter, _, e = name.rpartition(".")
        W = experts.whole(parameter)[int(e)] if parameter in experts.parameters else weights.read(f"{name}.weight")
        if not W.is_floating_point() or W.element_size() < 2:
            raise ValueError(f"{name} is stored quantised ({W.dtype}); take the spectra of the model in full precision")
        if sorted(W.shape) != sorted(shapes[name]):  # a Conv1D stores (in, out), and has the same spectrum
            raise ValueError(f"{name} is stored as {tuple(W.shape)}, not as {shapes[name]}; leave that module out")
        try:
            spectra[name] = kept_spectrum(W)
        except ValueError as error:
            raise ValueError(f"the weight of {name} {error}; repair it or leave that module out") from None
    return spectra


def stored_parameters(weights: Weights, names: Mapping[str, object]) -> ExpertFiles:
    """Return what reads the experts among the named weights; of other models, nothing."""
    wanted = {parameter for name in names if (parts := name.rpartition("."))[2].isdigit() and (parameter := parts[0])}
    modules = fused_experts(weights.blank()) if wanted else {}
    every = {f"{name}.{w}": ExpertWeight(module, w) for name, module in modules.items() for w in expert_weights(module)}
    return ExpertFiles(weights, {name: every[name] for name in every if name in wanted})


def all_singular_values(W: Tensor) -> Tensor:
    """Return all singular values of W (m, n): fp32, descending, on the CPU; computed on a GPU where there is one.

    Raises:
        ValueError: W holds NaN or Inf.
    """
    device = W.device if W.is_cuda or not torch.cuda.is_available() else torch.device("cuda")
    A = W.detach().to(device, torch.float64)
    largest = A.abs().max().clamp_min(torch.finfo(torch.float32).tiny)  # so that squares neither overflow nor vanish
    if not largest.isfinite():
        raise ValueError("holds NaN or Inf")
    A = (A if A.shape[0] <= A.shape[1] else A.mT) / largest
    G = A @ A.mT
    with one_thread():
        squares = torch.linalg.eigvalsh(G).flip(0).clamp_min(0)
    return (squares.sqrt() * largest).float().cpu()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kept_spectrum(W: Tensor) -> Tensor:
    """Return `all_singular_values(W)`, from the cache if a weight with this content was seen before, in any model."""
    key = cache.fingerprint(W)
    cached = cache.load("spectra", key) or {}
    if "S" in cached and cached["S"].shape == (min(W.shape),):
        return cached["S"]
    S = all_singular_values(W)
    cache.store("spectra", key, {"S": S})
    return S
