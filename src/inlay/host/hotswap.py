"""Hot swap of an Inlay adapter: new tensors in the place of the old ones, and nothing else touched.

PEFT finds an adapter's tensors by asking whether its name occurs anywhere in a key, and sets those that the new one
lacks to 0: a swap of "foo" would empty "foobar". Its function is replaced by one that goes by the slots.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from peft.utils import hotswap as peft_hotswap
from torch import Tensor, nn

from inlay.host.adapter_state import ROOT, plain_key, saved_key
from inlay.host.config import INLAY
from inlay.host.layer import adapted


@torch.no_grad()
def swap_adapter(model: Any, state: dict[str, Tensor], adapter_name: str, config: Any) -> None:
    """Fill the slots of `adapter_name` from `state`; a layer that the new adapter does not change is left at W.

    Args:
        model: adapted, also within torch.compile.
        state: the new adapter's tensors by their keys in a file or in the model.
        adapter_name: the adapter that is replaced.
        config: of the new adapter.

    Raises:
        ValueError: the adapter is merged, or the new one is of other hyperparameters, layers or shapes, not finite or
            not whole.
    """
    peft_hotswap.check_hotswap_configs_compatible(model.peft_config[adapter_name], config)
    layers = {plain_key(name).removeprefix(ROOT): layer for name, layer in adapted(model, adapter_name).items()}
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"adapter {adapter_name!r} is merged; unmerge it before it is swapped")
    new = {saved_key(key, adapter_name).removeprefix(ROOT): tensor for key, tensor in state.items()}
    slots = {
        saved_key(f"{name}.{path}", adapter_name): slot
        for name, layer in layers.items()
        for path, slot in layer.slots(adapter_name).items()
    }
    faults = [f"{key} belongs to no slot of {adapter_name!r}" for key in sorted(new.keys() - slots.keys())]
    faults += [
        f"{key} has shape {tuple(tensor.shape)}, not {tuple(slots[key].weight.shape)}"
        for key, tensor in new.items()
        if key in slots and tensor.shape != slots[key].weight.shape
    ]
    faults += [f"{key} holds NaN or Inf" for key, tensor in new.items() if not tensor.isfinite().all()]
    for name in layers:
        keys = [key for key in slots if key.startswith(f"{name}.")]
        if 0 < sum(key in new for key in keys) < len(keys):
            faults.append(f"{next(key for key in keys if key not in new)} is missing")
    if faults:
        raise ValueError(f"this adapter cannot be swapped in: {'; '.join(faults[:3])}")
    for key, slot in slots.items():
        slot.weight.copy_(new[key]) if key in new else slot.weight.zero_()
    for layer in layers.values():
        layer.cuts[adapter_name].pending = False
        layer.set_scale(adapter_name, 1.0)


def replace_peft_hotswap() -> None:
    """Let PEFT's hot swap go by the slots where the adapter is Inlay's; doing it twice changes nothing."""
    original = peft_hotswap.hotswap_adapter_from_state_dict
    if getattr(original, "knows_inlay", False):
        return

    @wraps(original)
    def swap(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        if config.peft_type == INLAY:
            swap_adapter(model, state_dict, adapter_name, config)
        else:
            original(model, state_dict, adapter_name, config, *args, **kwargs)

    swap.knows_inlay = True  # type: ignore[attr-defined]
    peft_hotswap.hotswap_adapter_from_state_dict = swap
