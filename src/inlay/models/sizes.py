"""Sizes of models: their layers, how many parameters they have and train, and the memory that is free for them."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from inlay.host.experts import EXPERTS_STAY, AdaptedExperts, fused_experts
from inlay.host.layer import InlayLinear
from inlay.host.slot import trained_numbers
from inlay.models.base import BaseModel


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return a model's decoder layers: its longest list of modules (empty where it has none)."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def repeated_depths(model: PreTrainedModel) -> tuple[int, int] | None:
    """Return two small numbers of layers, from which what is affine in their number follows for the whole model.

    None is returned where its layers are few, or do not repeat.
    """
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
    base: BaseModel, config: PeftConfig | None, auto: Any = AutoModelForCausalLM, at: float = 0.0, **settings: Any
) -> int:
    """Count the parameters that an adapter of `config` trains on a base; without a config, all of the base.

    Args:
        base: the model.
        config: of the adapter.
        auto: the transformers class of the model.
        at: the fraction of the training that is done; some methods freeze symbols on the way.
        settings: values in place of those of the model's configuration.

    Raises:
        ValueError: the config does not fit the model.
    """
    model = base.meta(torch.float32, auto=auto, **settings)
    if config is None:
        return count_trainable(model)
    adapted = get_peft_model(model, config)
    return count_trainable(adapted) - (resting_numbers(adapted, at) if at else 0)


def resting_numbers(model: nn.Module, t: float) -> int:
    """Count the entries of an adapted model's parameters that its methods leave untrained at t."""
    layers = [(m, name) for m in model.modules() if isinstance(m, InlayLinear) for name in m.active_adapters]
    thetas = [m.theta(name) for m, name in layers if name in m.cuts]
    return sum(p[k].numel() for method, p, _ in thetas for k in method.schedule(p, t))


def count_trainable(model: nn.Module) -> int:
    """Count the parameters that a model trains."""
    return trained_numbers(model)


def count_trained_and_base(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that are trained, and those of the base model."""
    if not isinstance(model, PeftModel):
        return count_trainable(model), sum(p.numel() for p in model.parameters())
    trained, everything = model.get_nb_trainable_parameters()
    return trained, everything - trained


def frozen_experts(model: nn.Module) -> str | None:
    """Return a line on the experts of a model that stay as they are; None where it has none, or they are trained.

    transformers keeps all experts of a layer in tensors of three dimensions, which are no linear layers to adapt.
    """
    frozen = any(
        not isinstance(model.get_submodule(name), AdaptedExperts) and not all(p.requires_grad for p in m.parameters())
        for name, m in fused_experts(model).items()
    )
    return EXPERTS_STAY if frozen else None


def free_memory() -> int:
    """Return the free bytes of the GPU or, without one, of the machine, which kills a process that takes too much."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
