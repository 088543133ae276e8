"""Translate PEFT's LoRA, MiSS and Bone adapters to Inlay adapters with the same outputs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.miss import MissLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Conv1D

from inlay.conversion.lora_factors import target_names
from inlay.conversion.peft_folder import (
    ROOT,
    PeftFolder,
    build_peft_adapter,
    check_config,
    peft_layers,
    without_base_copies,
)
from inlay.conversion.peft_starts import (
    aligned_signs,
    base_distance,
    check_peft_start,
    compute_peft_start,
    moves_base,
    start_notes,
)
from inlay.host import seal
from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX, START, adapted
from inlay.models.base import BaseModel
from inlay.models.loading import DTYPES
from inlay.models.stored_weights import Weights
from inlay.numerics import linalg


@dataclass
class Translation:
    """Hold an adapter in Inlay's terms: hyperparameters of each module, and θ, θ₀ by their names in a file."""

    method: str
    dropout: float
    targets: list[str] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)  # biases, modules that were trained whole
    notes: list[str] = field(default_factory=list)

    def put(self, module: str, settings: dict[str, Any], theta: dict[str, Tensor]) -> None:
        """Add a module with its hyperparameters and tensors."""
        self.settings[module] = settings
        for path, value in theta.items():
            self.tensors[f"{ROOT}{module}.{path}.weight"] = value.float().contiguous()


def translate(source: PeftFolder, first: PeftFolder | None) -> Translation:
    """Translate an adapter into Inlay's terms. `first` is the same adapter before training.

    Raises:
        ValueError: something in it has no equal here, its files do not fit the base, or its start is lost.
    """
    check_config(source)
    if source.kind != "LORA":
        if first is not None:
            raise ValueError(f"a {source.kind} adapter leaves the base as it is; leave out the initial adapter")
        return from_miss(source)
    return from_lora(source, first)


def trained_whole(source: PeftFolder, factors: tuple[str, ...]) -> dict[str, Tensor]:
    """Return what was trained beside the adapter's factors, which are known by parts of their names."""
    return {k: v for k, v in source.tensors.items() if not any(part in k for part in factors)}


def from_miss(source: PeftFolder) -> Translation:
    """Translate MiSS to Bone, or to Bat by columns. The Bone type that PEFT had up to 0.18 is MiSS by another name."""
    tensors = {k.replace(".bone_block", ".miss_block"): v for k, v in source.tensors.items()}
    built = build_peft_adapter(source, MissConfig, {})
    source = without_base_copies(built, replace(source, tensors=tensors))
    init, dropout = source.config.get("init_weights", True), source.config.get("miss_dropout", 0.0)
    bat = init == "bat"
    translation = Translation("bat_col" if bat else "bone", 0.0 if bat else dropout)
    if bat and dropout:
        translation.notes.append(f"PEFT ignores miss_dropout={dropout} where init_weights='bat', so it is 0 here")
    if init == "mini":
        translation.notes.append(
            "MiSS's mini block is repeated over the outputs: training goes on with all of Bone's numbers"
        )
    for name, layer in peft_layers(built, MissLayer).items():
        D = source.tensors[f"{ROOT}{name}.miss_block"]
        if bat:
            translation.put(name, {"r": D.shape[1]}, {PREFIX + "B": D})
        else:
            translation.put(name, {"r": D.shape[0]}, {PREFIX + "D": D.repeat(1, layer.out_features // D.shape[1])})
    translation.targets, translation.rest = (
        target_names(built, list(translation.settings)),
        trained_whole(source, (".miss_block",)),
    )
    return translation


@torch.no_grad()
def from_lora(source: PeftFolder, first: PeftFolder | None) -> Translation:
    """Translate a LoRA: as it is where the base was left alone, else against its start."""
    built = build_peft_adapter(source, LoraConfig, {"init_lora_weights": True})
    layers = peft_layers(built, LoraLayer)
    start = str(source.config.get("init_lora_weights", True)).lower()
    moved = moves_base(start, first is not None)
    if moved:
        check_peft_start(start, {name: layer.get_base_layer() for name, layer in layers.items()}, built)
    source = without_base_copies(built, source, layers if moved else ())
    first = None if first is None else without_base_copies(built, first, layers)
    translation = Translation(
        "pissa" if moved and start.startswith("pissa") else "lora", source.config.get("lora_dropout", 0.0)
    )
    translation.targets, translation.rest = (
        target_names(built, list(layers)),
        trained_whole(source, (".lora_A.", ".lora_B.")),
    )
    if start == "mica":
        translation.notes.append("MiCA keeps B as it is in training; here it is trained too")
    weights = source.base.weights() if moved and first is None else None
    furthest = doubt = 0.0
    for name, layer in layers.items():
        A, B = lora_pair(source, name)
        r, s = layer.r["default"], layer.scaling["default"]
        if not moved:
            translation.put(name, *lora_values(A, B, s))
            continue
        if first is not None:
            A0, B0 = lora_pair(first, name)
        else:
            assert weights is not None
            A0, B0, unsure = compute_peft_start(start, base_matrix(weights, name, layer.get_base_layer()), r, s)
            doubt = max(doubt, unsure)
        A0, B0 = aligned_signs(A0, B0, A)
        furthest = max(furthest, base_distance(A, B, A0, B0, name))
        if translation.method == "pissa":
            theta = {PREFIX + "A": A, PREFIX + "B": B, START + "A": A0, START + "B": B0}
            translation.put(name, {"r": r, "scale": s}, theta)
        else:
            translation.put(name, *lora_values(torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1), s))
    if moved:
        translation.notes += start_notes(start, furthest, None if weights is None else source.base.resolved, doubt)
    return translation


def lora_pair(source: PeftFolder, name: str) -> tuple[Tensor, Tensor]:
    """Return A (r × in) and B (out × r) in fp32."""
    A, B = (source.tensors[f"{ROOT}{name}.lora_{k}.weight"].float() for k in "AB")
    return A, B


def lora_values(A: Tensor, B: Tensor, s: float) -> Any:
    """Return the hyperparameters and θ of a LoRA s B A, compressed where its rank is above what the weight allows."""
    if A.shape[0] > (most := min(A.shape[1], B.shape[0])):
        U, S, Vh = linalg.compress(B, A)
        root = S.sqrt()
        A, B = torch.zeros(most, A.shape[1]), torch.zeros(B.shape[0], most)
        A[: len(S)], B[:, : len(S)] = root[:, None] * Vh, U * root
    return {"r": A.shape[0], "alpha": float(f"{s * A.shape[0]:.12g}")}, {PREFIX + "A": A, PREFIX + "B": B}


def base_matrix(weights: Weights, name: str, layer: nn.Module) -> Tensor:
    """Read a base weight as (out × in) in the dtype it is stored in."""
    W = weights.read(f"{name}.weight")
    if W.dtype not in DTYPES.values():
        raise ValueError(
            f"{name} is stored as {W.dtype}, and the start cannot be computed from that; name another base"
        )
    return W.T if isinstance(layer, Conv1D) else W


def write_translation(folder: Path, source: PeftFolder, translation: Translation) -> None:
    """Save the adapter as PEFT saves it, filled on a base without memory, and seal it."""
    settings, patterns = common_settings(translation.settings)
    bias = source.config.get("bias") or "none"
    config = InlayConfig(
        method=translation.method,
        args=settings,
        dropout=translation.dropout,
        patterns=patterns,
        target_modules=translation.targets,
        modules_to_save=source.config.get("modules_to_save"),
        trainable_token_indices=source.config.get("trainable_token_indices"),
        bias="inlay_only" if bias.endswith("_only") else bias,
        task_type=source.config.get("task_type"),
        auto_mapping=source.config.get("auto_mapping"),
        revision=source.config.get("revision"),
    )
    model = get_peft_model(source.base.meta(torch.float32), config, low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, translation.rest | translation.tensors, low_cpu_mem_usage=True)
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)  # and, on the way, the config's seals
    assert config.seals is not None
    for name, mark in base_marks(model, source.base).items():
        config.seals[name]["base"] = mark
    config.inference_mode = True
    config.base_model_name_or_path = source.base.resolved  # which PEFT has just set to what transformers calls it
    config.save_pretrained(str(folder))
    save_file(saved | translation.rest, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def common_settings(settings: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the hyperparameters that most modules have, and `patterns` of whole names for the others."""
    kinds = {tuple(values.items()): values for values in settings.values()}
    count = Counter(tuple(values.items()) for values in settings.values())
    (most, _), *others = count.most_common()
    patterns = {}
    for other in (key for key, _ in others):
        names = [re.escape(name) for name, values in settings.items() if tuple(values.items()) == other]
        patterns["|".join(names)] = kinds[other]
    return kinds[most], patterns


def base_marks(model: PeftModel, base: BaseModel) -> dict[str, str]:
    """Return the marks of the base's weights by module; none where the base is not on this machine."""
    if not Path(base.resolved).is_dir():
        return {}
    try:
        weights = base.weights()
    except ValueError:
        return {}
    marks = {}
    for layer in adapted(model, "default").values():
        name = layer.cuts["default"].module
        if weights.key(f"{name}.weight") and (W := weights.read(f"{name}.weight")).dtype in DTYPES.values():
            marks[name] = seal.of_base(W.T if isinstance(layer.base_layer, Conv1D) else W)
    return marks
