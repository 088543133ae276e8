"""An adapter as a plain LoRA, which PEFT, vLLM and llama.cpp read without Inlay.

Where ΔW is low rank, the LoRA is the adapter: [B − B₀, B₀] [A; A − A₀], compressed to its true rank. Elsewhere it is
the nearest of a rank, and how near is reported. The base is not loaded; where a method reads its weight, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import Conv1D

from inlay.conversion.stored_experts import ExpertFiles, StoredExperts
from inlay.host import seal
from inlay.host.adapter_state import ROOT
from inlay.host.config import InlayConfig
from inlay.host.experts import ExpertWeight, InlayExperts, expert_weights, fused_experts
from inlay.host.layer import PREFIX, START, Holder, InlayLinear, adapted
from inlay.method import LowRank
from inlay.models.adapters import WEIGHTS, Adapter
from inlay.models.stored_weights import Weights
from inlay.numerics import linalg

TINY = torch.finfo(torch.float64).tiny
SIZES = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM serves
FUSED = ("gpt_oss",)  # types of models whose fused experts vLLM adapts in the form that PEFT writes


@dataclass(frozen=True)
class LoraDelta:
    """Hold the change of one weight as B A, its scale included, and how far that is from the change itself.

    Attributes:
        module: the weight's module.
        B: (out × r).
        A: (r × in).
        error: ‖B A − s(ΔW − ΔW₀)‖ over the norm of the change.
    """

    module: str
    B: Tensor
    A: Tensor
    error: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def rounding(self, dtype: torch.dtype) -> float:
        """Return ‖B A − B' A'‖ over ‖B A‖ for B', A' rounded to a dtype; through Gram matrices, never (out × in)."""
        B, A = self.B.double(), self.A.double()
        left = torch.cat([B, -self.B.to(dtype).double()], 1)
        right = torch.cat([A, self.A.to(dtype).double()])
        lost, whole = (((X.T @ X) * (Y @ Y.T)).sum().clamp(min=0) for X, Y in ((left, right), (B, A)))
        return (lost / whole.clamp(min=TINY)).sqrt().item()


Weighted = tuple[float, PeftModel]  # a weight, and an adapter on a base without memory


def lora_deltas(
    adapters: list[Weighted],
    base_weights: Callable[[], Weights],
    rank: int | None = None,
    energy: float | None = None,
) -> Iterator[LoraDelta]:
    """Yield the change of every adapted weight; of several adapters, their weighted sum.

    Args:
        adapters: each with its weight, on a base without memory.
        base_weights: opens the stored weights of the base, where a method reads them.
        rank: at most so many ranks.
        energy: as many ranks as keep this share of ‖ΔW‖².

    Raises:
        ValueError: a method shifts the bias, or its change has full rank and neither `rank` nor `energy` is given; or
            the adapters, or the base, were not cut from the same weights.
    """
    weights: Weights | None = None
    stored: StoredExperts | None = None
    layers: dict[str, list[tuple[float, InlayLinear]]] = {}
    for weight, model in adapters:
        for layer in adapted(model, "default").values():
            layers.setdefault(layer.cuts["default"].module, []).append((weight, layer))
    for module, parts in layers.items():
        one = parts[0][1]
        marks = [sealed["base"] for _, layer in parts if (sealed := layer.cuts["default"].seal)]
        for _, layer in parts:
            for mark in marks:
                layer.check_base("default", mark)
        for method in (layer.cuts["default"].method for _, layer in parts):
            if method.shifts:
                raise ValueError(
                    f"{module}: {method.name} shifts the bias, which a LoRA does not; merge the adapter, which is exact"
                )
        W = torch.empty(one.out_features, one.in_features, device="meta")
        reads = any(layer.cuts["default"].method.reads_weight for _, layer in parts)
        if isinstance(one, InlayExperts):
            if reads:
                stored = stored or StoredExperts(base_weights(), {n: own[0][1] for n, own in layers.items()})
                W = stored.whole(module)
            each = [(weight, cast(InlayExperts, layer).experts("default")) for weight, layer in parts]
            for e in range(one.shape[0]):
                of_one = [(weight, experts[e]) for weight, experts in each if e in experts]
                if of_one:
                    yield lora_delta(f"{module}.{e}", of_one, W[e].float() if reads else W, rank, energy)
                else:  # PEFT's has a place for every expert
                    out, inp = W.shape[-2:]
                    yield LoraDelta(f"{module}.{e}", torch.zeros(out, 1), torch.zeros(1, inp), 0.0)
            continue
        if reads:
            weights = weights or base_weights()
            W = weights.read(f"{module}.weight")
            if not W.is_floating_point():
                raise ValueError(
                    f"{module} is stored quantised, and {one.cuts['default'].method.name} reads its weight: it is no "
                    "LoRA without; merge the adapter, which is exact, or name the base in full precision"
                )
            W = W.T if isinstance(one.base_layer, Conv1D) else W
            for _, layer in parts:
                layer.check_base("default", seal.of_base(W))
            W = W.float()
        yield lora_delta(module, parts, W, rank, energy)


@torch.no_grad()
def lora_delta(
    module: str, parts: Sequence[tuple[float, Holder]], W: Tensor, rank: int | None, energy: float | None
) -> LoraDelta:
    """Return the change of the weight of `module`, exact where the methods are low rank and the rank allows it."""
    exact = all(isinstance(layer.theta("default")[0], LowRank) for _, layer in parts)
    if exact:
        factors = [factors_of(weight, layer, W) for weight, layer in parts]
        U, S, Vh = linalg.compress(torch.cat([B for B, _ in factors], 1), torch.cat([A for _, A in factors]))
    elif rank is None and energy is None:
        method = next(m for _, layer in parts if not isinstance(m := layer.theta("default")[0], LowRank))
        if not method.linear:
            method.delta({}, W)  # which refuses
        raise ValueError(
            f"the change of a {method.name} adapter has full rank, so a LoRA only comes near it: say how near, with "
            "a rank or an energy (0.9, say); or merge the adapter, which is exact"
        )
    else:
        D = torch.stack([weight * layer.change("default", W) for weight, layer in parts]).sum(0)
        narrow = energy is None and rank is not None and rank < min(D.shape)
        U, S, Vh = linalg.top_svd(D, rank) if narrow and rank else torch.linalg.svd(D, full_matrices=False)
    energies = S.double().square().cumsum(0)
    whole = energies[-1] if exact else D.double().square().sum()
    r = min(len(S), rank or len(S))
    if energy is not None:
        r = min(r, int((energies < energy * whole).sum()) + 1)
    root = S[:r].sqrt()
    B, A = (U[:, :r] * root).float(), (root[:, None] * Vh[:r]).float()
    if exact:
        lost = (whole - energies[r - 1]).clamp(min=0) if r < len(S) else 0 * whole
    else:
        lost = (D - B @ A).double().square().sum()
    return LoraDelta(module, B, A, (lost / whole.clamp(min=TINY)).sqrt().item())


def factors_of(weight: float, layer: Holder, W: Tensor) -> tuple[Tensor, Tensor]:
    """Return B (out × r) and A (r × in) in fp64, whose product is the weighted change of a low-rank method."""
    method, p, p0 = layer.theta("default")
    wide, wide0 = ({k: v.double() for k, v in (q or {}).items()} for q in (p, p0))
    B, A = cast(LowRank, method).pair(wide, None if p0 is None else wide0, W)
    return weight * method.s * B, A


def padded_to_one_rank(deltas: list[LoraDelta], pad: bool) -> int:
    """Return one rank for all: the largest, or the next that vLLM serves."""
    most = max(1, *(delta.rank for delta in deltas))
    return next((size for size in SIZES if size >= most), most) if pad else most


def widened_to_rank(delta: LoraDelta, r: int) -> tuple[Tensor, Tensor]:
    """Return B and A with zeros up to the rank r."""
    B, A = delta.B.new_zeros(delta.B.shape[0], r), delta.A.new_zeros(r, delta.A.shape[1])
    B[:, : delta.rank], A[: delta.rank] = delta.B, delta.A
    return B, A


def saved_beside(adapter: Adapter, grown: bool = False) -> dict[str, Tensor]:
    """Return what `adapter` holds beside θ and θ₀: modules and biases that were trained whole, rows of embeddings.

    Not the embeddings that PEFT saves along, as they are, where a head is adapted; but these too if they have `grown`.
    """
    config = cast(InlayConfig, adapter.config)
    rest = {k: v for k, v in adapter.tensors.items() if f".{PREFIX}" not in k and f".{START}" not in k}

    def trained(key: str) -> bool:
        module = key.rpartition(".")[0]
        whole = any(f".{module}.".find(f".{name}.") >= 0 for name in config.modules_to_save or ())
        return grown or whole or "token_adapter" in key or (config.bias != "none" and key.endswith("bias"))

    return {k: v for k, v in rest.items() if trained(k)}


def write_lora(
    folder: Path,
    source: Adapter,
    model: PeftModel,
    deltas: list[LoraDelta],
    r: int,
    dtype: torch.dtype,
    grown: bool = False,
    each: bool = False,
) -> None:
    """Write an ordinary PEFT folder: adapter_config.json and adapter_model.safetensors.

    Args:
        folder: the new folder.
        source: the adapter, whose other settings and tensors are kept.
        model: that adapter on a base without memory.
        deltas: the changes, of rank `r` at most.
        r: the rank of the LoRA.
        dtype: of its tensors.
        grown: whether the vocabulary grew, so that its embeddings are part of the adapter.
        each: whether experts are written one by one, by the names of their matrices in the checkpoint, for vLLM.

    Raises:
        ValueError: a value does not fit the dtype, or vLLM has no such form for the model's experts.
    """
    tensors = saved_beside(source, grown)
    fused = {layer.cuts["default"].module: layer for layer in adapted(model, "default").values()
             if isinstance(layer, InlayExperts)}  # fmt: skip
    own = [delta for delta in deltas if delta.module.rpartition(".")[0] not in fused]
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    if each and fused:
        matrices = loras_of_matrices(source.base_weights(), model, deltas, r)
    new: dict[str, Tensor] = {}
    for name, layer in {} if matrices else fused.items():
        factors = [widened_to_rank(d, r) for d in deltas if d.module.rpartition(".")[0] == name]
        new |= lora_of_experts(name, layer, factors, list(fused))
    for module, (B, A) in {**{d.module: widened_to_rank(d, r) for d in own}, **matrices}.items():
        new |= {f"{ROOT}{module}.lora_A.weight": A, f"{ROOT}{module}.lora_B.weight": B}
    for name, value in new.items():
        tensors[name] = value.to(dtype).clone(memory_format=torch.contiguous_format)
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} does not fit {dtype}; choose the dtype bfloat16 or float32")
    targets = target_names(model, [delta.module for delta in own]) if own else []
    given = cast(InlayConfig, source.config)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted({*targets, *(module.rpartition(".")[2] for module in matrices)}),
        target_parameters=None if matrices else sorted({".".join(name.split(".")[-3:]) for name in fused}) or None,
        bias="lora_only" if given.bias == "inlay_only" else given.bias,  # type: ignore[arg-type]
        modules_to_save=given.modules_to_save,
        trainable_token_indices=given.trainable_token_indices,
        fan_in_fan_out=any(isinstance(m.base_layer, Conv1D) for m in adapted(model, "default").values()),
        task_type=given.task_type,
        base_model_name_or_path=given.base_model_name_or_path,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def lora_of_experts(
    name: str, layer: InlayExperts, factors: list[tuple[Tensor, Tensor]], fused: list[str]
) -> dict[str, Tensor]:
    """Return the tensors of PEFT's LoRA on a parameter of experts, from (B, A) of each expert.

    PEFT nests what adapts several parameters of a module: the last of them is outside.
    """
    if not layer.base_layer.tall and not layer.base_layer.in_interface:  # PEFT takes it for (E, out, in)
        factors = [(A.T, B.T) for B, A in factors]
    experts = name.rpartition(".")[0]
    beside = [other for other in fused if other.rpartition(".")[0] == experts]
    prefix = f"{ROOT}{experts}{'.base_layer' * (len(beside) - 1 - beside.index(name))}"
    A = torch.cat([A for _, A in factors])
    B = torch.stack([B for B, _ in factors], -1).flatten(1)
    return {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}


def loras_of_matrices(
    weights: Weights, model: PeftModel, deltas: list[LoraDelta], r: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (B, A) of every matrix that the checkpoint stores of adapted experts, by its name there.

    vLLM packs these into its fused layers (`PackedLoRALayerWeights.pack_moe`), and wants all matrices of all experts of
    a layer: where one has no change, they are zeros. Nothing is returned of a model in `FUSED`, for which vLLM reads
    what PEFT does (`LoRAModelManager._stack_moe_lora_weights`).

    Raises:
        ValueError: vLLM has no known form for experts that are stored in this way.
    """
    base = model.get_base_model()
    known = {delta.module: widened_to_rank(delta, r) for delta in deltas}
    adapted_experts = {name.rpartition(".")[0].rpartition(".")[0] for name in known}
    parameters = {
        f"{name}.{weight}": ExpertWeight(module, weight)
        for name, module in fused_experts(base).items()
        for weight in expert_weights(module)
        if name in adapted_experts
    }
    files = ExpertFiles(weights, parameters)
    if whole := [piece.module for piece in files.pieces.values() if piece.expert is None]:
        alone = [name for name in parameters if f"{name}.0" not in known]
        if str(base.config.model_type) in FUSED and not alone:  # type: ignore[union-attr]
            return {}
        why = f"{alone[0]} has no adapter" if alone else f"{whole[0]} is stored fused, in a layout of its own"
        raise ValueError(f"to=vllm: vLLM has no form for these experts ({why}); merge the adapter, which is exact")
    found = {}
    for key, piece in files.pieces.items():
        parameter = parameters[piece.module]
        nothing = torch.zeros(parameter.out_features, r), torch.zeros(r, parameter.in_features)
        B, A = known.get(f"{piece.module}.{piece.expert}", nothing)
        found[key.removesuffix(".weight")] = B[piece.rows], A
    return found


def target_names(model: PeftModel, names: list[str]) -> list[str]:
    """Return the last parts of the modules' names, or the whole names where those would match more."""
    kinds = {name.rpartition(".")[2] for name in names}
    every = [n.replace(".base_layer", "") for n, _ in model.get_base_model().named_modules()]
    same = [n for n in every if n.rpartition(".")[2] in kinds]
    return sorted(kinds if set(same) <= set(names) else names)
