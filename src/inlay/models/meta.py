"""Models without memory: built on the meta device from a configuration alone, adapted and quantised like real ones."""

from __future__ import annotations

import copy
from typing import Any

import psutil
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from inlay.host.slot import trained_numbers
from inlay.messages import loading
from inlay.models.loading import load_config


def meta_model(
    name: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    layers: int | None = None,
    auto: Any = AutoModelForCausalLM,
    revision: str | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """A model without any memory behind it, which `get_peft_model` adapts as it would the real one; with only the
    first `layers` of its layers, if so asked. `auto` and `settings`: as in `models.load_model`."""
    config = load_config(name, trust_remote_code, revision, **settings)
    if layers is not None:
        config = cut_short(config, layers)
    with loading(f"model {name!r}"), torch.device("meta"):
        return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def cut_short(settings, layers: int):
    """A model's configuration with its first layers only."""
    settings = copy.deepcopy(settings)
    text = settings.get_text_config()
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return settings


def layers_of(model: nn.Module) -> nn.ModuleList:
    """A model's decoder layers: its longest list of modules (empty where it has none)."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def repeated_depths(model: PreTrainedModel) -> tuple[int, int] | None:
    """Two small numbers of layers from which all that is affine in their number follows for the whole model; None where
    its layers are few, or do not repeat."""
    layers = layers_of(model)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    marks = [[kind, *((n, p.shape) for n, p in m.named_parameters())] for kind, m in zip(kinds, layers, strict=False)]
    periods = (p for p in range(1, len(marks) // 2 + 1) if marks[p:] == marks[:-p])
    period = next(periods, None)
    if period is None or len(marks) != len(layers):
        return None
    few = len(layers) % period + period * (1 if len(layers) % period + period >= 2 else 2)
    return (few, few + period) if few + period < len(layers) else None


def count_parameters(
    name: str,
    config: PeftConfig | None,
    trust_remote_code: bool = False,
    auto: Any = AutoModelForCausalLM,
    **settings: Any,
) -> int:
    """How many numbers a config trains on a model; all without one.

    Raises:
        ValueError: it does not fit the model.
    """
    model = meta_model(name, torch.float32, trust_remote_code, auto=auto, **settings)
    return count_trainable(model if config is None else get_peft_model(model, config))


def count_trainable(model: nn.Module) -> int:
    """How many numbers are trained."""
    return trained_numbers(model)


def count_trained_and_base(model: nn.Module) -> tuple[int, int]:
    """How many numbers are trained, and how many the base model has."""
    if not isinstance(model, PeftModel):
        return count_trainable(model), sum(p.numel() for p in model.parameters())
    trained, everything = model.get_nb_trainable_parameters()
    return trained, everything - trained


def free_memory() -> int:
    """Free bytes of the GPU or, without one, of the machine, which would kill the process rather than say no."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
