"""An adapter as a plain LoRA, which PEFT, vLLM and llama.cpp read without Inlay.

Where ΔW is low rank, the LoRA is the adapter: [B − B₀, B₀] [A; A − A₀], compressed to its true rank. Elsewhere it is
the nearest of a rank, and how near is said. The base is not loaded; where a method reads its weight, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from inlay import linalg
from inlay.host import seal
from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX, START, InlayLinear, widen
from inlay.host.peft import adapted
from inlay.method import LowRank
from inlay.workbench import memory, models
from inlay.workbench.weights import Weights

TINY = torch.finfo(torch.float64).tiny
SIZES = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM serves


@dataclass(frozen=True)
class Change:
    """The change of one weight as B A, B (out × r), A (r × in), its scale included, and ‖B A − s(ΔW − ΔW₀)‖ over the
    norm of what it stands for."""

    module: str
    B: Tensor
    A: Tensor
    error: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def load(folder: Path, base: str) -> PeftModel:
    """An adapter on its base without the base's memory: θ is there, W is not."""
    return models.load_adapter(memory.meta_model(base, torch.float32), folder, light=True)


def changes(model: PeftModel, base: str, rank: int | None = None, energy: float | None = None) -> Iterator[Change]:
    """The change of every adapted weight.

    Raises:
        ValueError: a method's change has full rank and neither `rank` nor `energy` is given.
    """
    weights: Weights | None = None
    for layer in adapted(model, "default").values():
        cut = layer.cuts["default"]
        W = torch.empty(layer.out_features, layer.in_features, device="meta")
        if cut.method.reads_weight:
            weights = weights or Weights(base)
            W = weights.read(f"{cut.module}.weight")
            if not W.is_floating_point():
                raise ValueError(
                    f"{cut.module} is stored quantised, and a {cut.method.name} adapter is no LoRA without its weight; "
                    "merge it, which is exact, or name the base in full precision"
                )
            W = W.T if isinstance(layer.base_layer, Conv1D) else W
            layer.check_base("default", seal.of_base(W))
            W = W.float()
        yield change(layer, W, rank, energy)


@torch.no_grad()
def change(layer: InlayLinear, W: Tensor, rank: int | None, energy: float | None) -> Change:
    """One weight's change, exact where the method is low rank and the rank allows it."""
    cut, (method, p, p0) = layer.cuts["default"], layer.theta("default")
    if isinstance(method, LowRank):
        p = {k: v.double() for k, v in p.items()}
        B, A = method.pair(p, None if p0 is None else {k: v.double() for k, v in p0.items()}, layer.in_features)
        U, S, Vh = linalg.compress(method.s * B, A)
    elif rank is None and energy is None:
        raise ValueError(
            f"the change of a {method.name} adapter has full rank, so a LoRA only comes near it: say how near, with "
            "a rank or an energy (0.9, say); or merge the adapter, which is exact"
        )
    else:
        D = method.s * method.offset(widen(p), None if p0 is None else widen(p0), W)
        narrow = energy is None and rank is not None and rank < min(D.shape)
        U, S, Vh = linalg.top_svd(D, rank) if narrow and rank else torch.linalg.svd(D, full_matrices=False)
    energies = S.double().square().cumsum(0)
    whole = energies[-1] if isinstance(method, LowRank) else D.double().square().sum()
    r = min(len(S), rank or len(S))
    if energy is not None:
        r = min(r, int((energies < energy * whole).sum()) + 1)
    root = S[:r].sqrt()
    B, A = (U[:, :r] * root).float(), (root[:, None] * Vh[:r]).float()
    if isinstance(method, LowRank):
        lost = (whole - energies[r - 1]).clamp(min=0) if r < len(S) else 0 * whole
    else:
        lost = (D - B @ A).double().square().sum()
    return Change(cut.module, B, A, (lost / whole.clamp(min=TINY)).sqrt().item())


def padded(made: list[Change], pad: bool) -> int:
    """One rank for all: the largest, or the next that vLLM serves."""
    most = max(1, *(c.rank for c in made))
    return next((size for size in SIZES if size >= most), most) if pad else most


def widened(c: Change, r: int) -> tuple[Tensor, Tensor]:
    """B and A with zeros up to the rank r."""
    B, A = c.B.new_zeros(c.B.shape[0], r), c.A.new_zeros(r, c.A.shape[1])
    B[:, : c.rank], A[: c.rank] = c.B, c.A
    return B, A


def write(folder: Path, source: Path, model: PeftModel, made: list[Change], r: int, dtype: torch.dtype) -> None:
    """An ordinary PEFT folder: adapter_config.json and adapter_model.safetensors."""
    tensors = {}
    for c in made:
        B, A = widened(c, r)
        for kind, value in (("lora_A", A), ("lora_B", B)):
            tensors[f"base_model.model.{c.module}.{kind}.weight"] = value.to(dtype).contiguous()
    own = (f".{PREFIX}", f".{START}")
    stored = load_file(source / "adapter_model.safetensors")
    tensors |= {k: v for k, v in stored.items() if not any(part in k for part in own)}  # modules_to_save, biases
    asked = cast(InlayConfig, InlayConfig.from_pretrained(str(source)))
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=targets(model, [c.module for c in made]),
        bias="lora_only" if asked.bias == "inlay_only" else asked.bias,  # type: ignore[arg-type]
        modules_to_save=asked.modules_to_save,
        trainable_token_indices=asked.trainable_token_indices,
        fan_in_fan_out=any(isinstance(m.base_layer, Conv1D) for m in adapted(model, "default").values()),
        task_type=asked.task_type,
        base_model_name_or_path=asked.base_model_name_or_path,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def targets(model: PeftModel, names: list[str]) -> list[str]:
    """The last parts of the modules' names, or the whole names where those would match more."""
    kinds = {name.rpartition(".")[2] for name in names}
    every = [n.replace(".base_layer", "") for n, _ in model.get_base_model().named_modules()]
    same = [n for n in every if n.rpartition(".")[2] in kinds]
    return sorted(kinds if set(same) <= set(names) else names)
