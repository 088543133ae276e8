"""What a run will hold in memory, counted on the meta device: no weights are loaded, nothing is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import psutil
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from inlay.workbench.models import load_config

NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bits, those of a block's scale, and those of 256 scales' own
PACKED = {"nf4": NF4, "nf4_offset": NF4, "int8": 1.0}  # bytes a number


@dataclass(frozen=True)
class Memory:
    """Bytes: the frozen weights, what is trained with its gradients and AdamW's two moments, and the activations that
    one micro-batch keeps for the backward pass."""

    weights: int
    training: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations


def meta_model(name: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without any memory behind it; `get_peft_model` adapts it as it would the real one."""
    settings = load_config(name, trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code)


def count(name: str, config: PeftConfig | None) -> int:
    """How many numbers a config trains on a model; all without one.

    Raises:
        ValueError: it does not fit the model.
    """
    return trainable(adapted(meta_model(name, torch.float32), config))


def adapted(model: PreTrainedModel, config: PeftConfig | None) -> nn.Module:
    """A model on the meta device with its adapter, if it gets one."""
    if isinstance(config, LoraConfig):
        config = replace(config, init_lora_weights=True)  # a start from the weights needs their values
    return model if config is None else get_peft_model(model, config)


def trainable(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def numbers(model: nn.Module) -> tuple[int, int]:
    """How many numbers are trained, and how many the base model has."""
    if not isinstance(model, PeftModel):
        return trainable(model), sum(p.numel() for p in model.parameters())
    trained, everything = model.get_nb_trainable_parameters()
    return trained, everything - trained


def saved_bytes(model: nn.Module, batch: int, length: int) -> int:
    """Bytes of activations that one forward pass keeps for the backward pass, parameters not counted."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t  # held, so that no later storage takes its place
        return t

    weight = next(model.parameters())
    ids = torch.zeros(batch, length, dtype=torch.long, device=weight.device)
    # A whole mask is given because building one looks at values, which meta tensors do not have.
    mask = torch.zeros(batch, 1, length, length, dtype=weight.dtype, device=weight.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def estimate(model: nn.Module, batch: int, length: int, quantize: str = "none") -> Memory:
    """The memory of one training step of an adapted model (on any device, the meta one included), whose linear layers
    will be quantised as a recipe says."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = {id(t): t for t in [*model.parameters(), *model.buffers()] if not t.requires_grad}.values()
    return Memory(
        weights=round(sum(t.numel() * t.element_size() for t in rest) - saved_by_packing(model, quantize)),
        training=sum(p.numel() * p.element_size() * 4 for p in trained),
        activations=saved_bytes(model, batch, length),
    )


def saved_by_packing(model: nn.Module, quantize: str) -> float:
    """Bytes by which a quantised checkpoint of the model is smaller."""
    if quantize == "none":
        return 0
    plain = get_keys_to_not_convert(cast(PeftModel, model).get_base_model())
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] not in plain]
    return sum(m.weight.numel() * (m.weight.element_size() - PACKED[quantize]) for m in linear)


def largest_batch(model: nn.Module, length: int, start: int = 64) -> int:
    """The largest power of two (up to `start`) whose activations, counted on the meta device, fit the free memory of
    the GPU or, without one, of the machine, which would kill the process rather than say no."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    one = saved_bytes(model, 1, length)
    # Half as much again: what lives only for a moment in the forward and backward pass.
    return next((start >> k for k in range(start.bit_length()) if 1.5 * one * (start >> k) < 0.8 * free), 1)


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
