"""How strongly an adapter is applied at inference: a factor on its change, 1 as it was trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft import PeftConfig
from torch import nn

from inlay.host.adapter_state import wrapped_keys
from inlay.host.config import InlayConfig
from inlay.host.layer import InlayLinear


def set_scale(model: nn.Module, scale: float | Mapping[str, float]) -> None:
    """Set the strength at which `model` applies its adapters: y = W x + scale · s (ΔW(θ) − ΔW(θ₀)) x.

    0 is the base alone, 1 the adapter as it was trained, and values beside are allowed. Several active adapters add up,
    each at its own scale. Merging takes the scales into the weights; `save_pretrained` does not store them.

    Args:
        model: adapted.
        scale: of all adapters, or of each by its name.

    Raises:
        ValueError: no such adapter, a scale that is no finite number, a merged adapter, one that also trained
            modules, tokens or biases whole, which have no strength, or one that was cut out of its base by a fold.
    """
    layers = [module for module in model.modules() if isinstance(module, InlayLinear)]
    names = {name for layer in layers for name in layer.cuts}
    scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(sorted(names), scale)
    if unknown := sorted(scales.keys() - names):
        raise ValueError(
            f"no adapter of Inlay's is called {unknown[0]!r}; there are {', '.join(sorted(names)) or 'none'}"
        )
    if not scales:
        raise ValueError("the model has no adapter of Inlay's, so there is nothing to scale")
    for name, value in scales.items():
        check_scalable(model, name, value)
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name, value in scales.items():
                layer.set_scale(name, value)
    except ValueError:  # the layers before the one at fault, too
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
        raise


def check_scalable(model: nn.Module, name: str, scale: float) -> None:
    """Raise a ValueError where the adapter `name` also trained what a `scale` other than 1 has no meaning for."""
    if scale == 1:
        return
    if whole := wrapped_keys(model, name):
        raise ValueError(
            f"the adapter {name!r} also trained {next(iter(whole))} whole or some of its tokens, which have no "
            "strength; leave its scale at 1, or switch the adapter off with disable_adapter()"
        )
    config = getattr(model, "peft_config", {}).get(name)
    if config is not None:
        check_config_scalable(config, name, scale)


def check_config_scalable(config: PeftConfig, name: str, scale: float) -> None:
    """Raise a ValueError where the configuration tells that the adapter `name` cannot be used at `scale`."""
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} is not a finite number")
    if scale == 1:
        return
    if not isinstance(config, InlayConfig):
        raise ValueError(f"the adapter {name!r} is one of PEFT's own, which have no scale here; leave it at 1")
    if config.bias != "none":
        raise ValueError(f"the adapter {name!r} also trained biases, which have no strength; leave its scale at 1")
    if config.folded:
        raise ValueError(
            f"the adapter {name!r} was cut out of its base by a fold, which is not whole without all of it; leave its "
            "scale at 1"
        )
    if config.modules_to_save or config.trainable_token_indices:
        what = config.modules_to_save or "tokens"
        raise ValueError(
            f"the adapter {name!r} also trained {what} whole, which have no strength; leave its scale at 1"
        )


@contextmanager
def scaled(model: nn.Module, scale: float | Mapping[str, float]) -> Iterator[None]:
    """Apply the adapters of `model` at other strengths in a `with` block (see `set_scale`), and as before after it."""
    before = [(m, dict(m.scaling)) for m in model.modules() if isinstance(m, InlayLinear)]
    try:
        set_scale(model, scale)
        yield
    finally:
        for layer, scales in before:
            layer.scaling.update(scales)
