"""A guard against two faults of bitsandbytes' 4-bit weights."""

from __future__ import annotations

import warnings

from torch import nn


def readable(base_layer: nn.Module) -> nn.Module:
    """Return `base_layer`, guarded against two faults of bitsandbytes in 4-bit weights on a CPU.

    Where there is avx512_bf16 it repacks a weight in place at its first inference, and then it dequantises to other
    numbers; and it misreads rows that end in a block.

    Raises:
        ValueError: it has already repacked the weight.
    """
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes repacked this 4-bit weight when the model ran on the CPU, and it can no longer be read; "
            "load the model anew and adapt it before its first run"
        )
    if hasattr(base_layer, "support_avx512bf16_for_cpu"):
        base_layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if state is not None and state.absmax.device.type == "cpu" and state.shape[-1] % state.blocksize:
        warnings.warn(
            f"bitsandbytes misreads a 4-bit weight of shape {tuple(state.shape)} on the CPU, with or without adapters: "
            f"{state.shape[-1]} is no multiple of its block of {state.blocksize}",
            stacklevel=2,
        )
    return base_layer
