"""A LoRA as llama.cpp reads it: a GGUF file of kind "adapter", and the Ollama Modelfile beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from inlay.conversion.lora_factors import LoraDelta, widened_to_rank
from inlay.messages import one_line

# transformers' model_type -> llama.cpp's architecture, and whether llama.cpp keeps the rows of q and k in its own order
ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
    "gemma": (gguf.MODEL_ARCH.GEMMA, False),
    "gemma2": (gguf.MODEL_ARCH.GEMMA2, False),
}
FILE = "adapter.gguf"


def interleaved(B: Tensor, module: str, config: Any) -> Tensor:
    """Reorder the rows of a rotated projection, (heads · d × ...), from transformers' halves to llama.cpp's pairs.

    Other weights, and architectures that keep the halves, are returned as they are.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.rpartition(".")[2])
    if heads is None or not ARCHITECTURES[config.model_type][1]:
        return B
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def check_lora_architecture(config: Any, folder: str) -> None:
    """Raise a ValueError unless this library knows how llama.cpp names and orders a model's weights."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"{config.model_type} models are not written as GGUF here (these are: {', '.join(ARCHITECTURES)}); export "
            f"--to lora and run llama.cpp's convert_lora_to_gguf.py {folder}"
        )


def write_lora_gguf(path: Path, config: Any, deltas: list[LoraDelta], r: int, dtype: torch.dtype) -> None:
    """Write the GGUF file. Its tensors are fp32 or fp16 (bf16 becomes fp32, which holds it)."""
    arch = ARCHITECTURES[config.model_type][0]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(r))
    for delta in deltas:
        name = names.get_name(delta.module)
        if name is None:
            raise ValueError(f"{delta.module} has no name in llama.cpp; leave it out of target_modules, or merge")
        B, A = widened_to_rank(delta, r)
        for part, value in (("lora_a", A), ("lora_b", interleaved(B, delta.module, config))):
            value = value.to(torch.float16 if dtype == torch.float16 else torch.float32)
            writer.add_tensor(f"{name}.weight.{part}", value.contiguous().numpy())
    close_writer(writer)


def close_writer(writer: gguf.GGUFWriter) -> None:
    """Write all that was added to the file, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def modelfile(base: str) -> str:
    """Return an Ollama Modelfile; the base must lie beside it as GGUF."""
    return f"# The base as GGUF: {one_line(base)}\nFROM ./base.gguf\nADAPTER ./{FILE}\n"
