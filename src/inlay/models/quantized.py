"""Weights that bitsandbytes packed to 4 or 8 bits: how models get them, and how they are read back."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from inlay.host import seal
from inlay.messages import check_installed
from inlay.models.stored_weights import Weights


def quantization_config(kind: str, dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """Return bitsandbytes' settings for "nf4" (blocks of 64, double quantisation, products in `dtype`) or "int8".

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    check_installed("a quantised base", "bitsandbytes")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def pack_linears(blank: PreTrainedModel, kind: str, dtype: torch.dtype) -> None:
    """Pack the linear layers of a model without memory, as a checkpoint of that kind has them.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    settings = quantization_config(kind, dtype)
    from bitsandbytes.functional import create_dynamic_map, int8_vectorwise_quant, name2qmap
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
    from transformers.integrations import replace_with_bnb_linear

    name2qmap.setdefault("dynamic", create_dynamic_map())  # else it keeps the table it makes here, on meta, for good
    replace_with_bnb_linear(blank, get_keys_to_not_convert(blank), settings)
    for module in blank.modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            for p in module.parameters():
                p.data = p.data.to(dtype)  # which a weight is then dequantised to
        if isinstance(module, Linear4bit):
            module.weight = cast(Any, module.weight)._quantize("meta")
        elif isinstance(module, Linear8bitLt):
            values, scales, _ = int8_vectorwise_quant(module.weight.data.half())
            module.weight = cast(Any, Int8Params)(values, CB=values, SCB=scales, requires_grad=False)
            module.state.threshold = 0.0  # which inputs are outliers is a matter of values


def nf4_savings(blank: PreTrainedModel, dtype: torch.dtype) -> tuple[float, float]:
    """Return what 4 bits save of a model's bytes, and how many a dequantised weight takes for a moment, at most.

    By the sizes of NF4 in blocks of 64 with double quantisation, as bitsandbytes stores it, which need not be there.
    """
    kept = get_keys_to_not_convert(blank)
    sizes = [
        module.weight.numel()
        for name, module in blank.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(name == key or name.startswith(f"{key}.") for key in kept)
    ]
    stored = sum(n / 2 + n / 64 + 4 * n / (64 * 256) for n in sizes)
    return sum(sizes) * dtype.itemsize - stored, max(sizes, default=0) * (dtype.itemsize + 4 / 64)


def dequantized(weights: Weights, name: str) -> tuple[Tensor, str | None]:
    """Return a weight that bitsandbytes packed in a checkpoint, as (out × in) in fp32, and its mark.

    Raises:
        ValueError: something else packed it.
    """
    W, beside = weights.read(name), {end: weights.read(key) for end, key in weights.beside(name).items()}
    if any(end.startswith("quant_state.") for end in beside):
        from bitsandbytes.nn import Params4bit

        packed = Params4bit.from_prequantized(W, beside, device="cpu")
        packed.quant_state.dtype = torch.float32
        return unpack_weight(packed), seal.of_packed(packed)
    if W.dtype == torch.int8 and "SCB" in beside:
        return W.float() * (beside["SCB"].float() / 127)[:, None], None
    raise ValueError(f"{name} is stored as {W.dtype} which is not read here; name the base in full precision")


def unpack_weight(packed: Any) -> Tensor:
    """Return a packed weight as (out × in) in fp32."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.data, packed.quant_state).float()
