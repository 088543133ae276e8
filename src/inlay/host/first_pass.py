"""A look at the first forward pass of an adapted model: whether every adapted layer took part in it.

Some models never call a linear layer but read its weight, and compute with that. An adapter there changes nothing,
learns nothing and, once merged, changes the model.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from inlay.host.layer import InlayLinear
from inlay.host.module_names import part_of

DROPS_LAYERS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")  # in training, at random


class FirstPass:
    """Watch a model by two hooks that remove themselves after its first whole forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self.begin),
            model.register_forward_hook(self.end),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def begin(self, model: nn.Module, args: Any) -> None:
        """Forget who read the weights before: setting a model up is no forward pass."""
        if not torch.compiler.is_compiling():
            for layer in model.modules():
                if isinstance(layer, InlayLinear):
                    layer.weight_read = False

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Notice the layers that took no part.

        Raises:
            ValueError: the weight of one was read past it.
        """
        drops = model.training and any(getattr(getattr(model, "config", None), key, 0) for key in DROPS_LAYERS)
        if torch.compiler.is_compiling() or drops:
            return
        self.remove()
        idle = idle_layers(model)
        past = [name for name, layer in idle.items() if layer.weight_read]
        if past:
            raise ValueError(
                f"{past[0]} is never called, and this model reads its weight past the layer: the adapter has no effect "
                "there; leave it out of target_modules (or name it in exclude_modules)"
            )
        if idle:
            more = f" (and {len(idle) - 1} more)" if len(idle) > 1 else ""
            warnings.warn(
                f"{next(iter(idle))}{more} took no part in the model's first forward pass: if it never does, the "
                "adapter has no effect there; leave it out of target_modules",
                stacklevel=2,
            )


def idle_layers(model: nn.Module) -> dict[str, InlayLinear]:
    """Return the layers with an active adapter that were not called yet; of experts, only where none of a kind was."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, InlayLinear)}
    kinds = {part_of(name) for name, layer in layers.items() if layer.called}
    idle = {}
    for name, layer in layers.items():
        routed = sum(part.isdigit() for part in name.split(".")) > 1 and part_of(name) in kinds
        if not layer.called and not routed and any(adapter in layer.cuts for adapter in layer.active_adapters):
            idle[name] = layer
    return idle
