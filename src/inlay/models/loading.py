"""How a model's name becomes a folder or a hub id, and which dtype it computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from inlay.files.atomic import find_again
from inlay.files.untrusted import regular_files, user_path
from inlay.models import builtin
from inlay.models.folded import fold_at

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name: str) -> str:
    """Return a model's name as a folder or hub id; the built-in model is also found under another machine's cache.

    Raises:
        ValueError: the name looks like a path and nothing is there.
    """
    if name == builtin.MODEL or (not Path(name).exists() and Path(name).name.startswith(builtin.FOLDER)):
        return str(builtin.model_dir())
    path = find_again(user_path(name))
    if path.suffix == ".gguf" and path.is_file():
        raise ValueError(f"{name} is packed for llama.cpp; give the folder or hub id of the model it was made of")
    if path.exists():
        path = path / "base" if fold_at(name) else path
        if (path / "recipe.yaml").exists() and (path / "model" / "config.json").exists():  # a run of full fine-tuning
            path = path / "model"
        if not (path / "config.json").exists():
            raise ValueError(f"{name} is no model folder: it has no config.json")
        return str(regular_files(path).resolve())  # an adapter names its base, and may be used from another folder
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model folder {name} does not exist; give a folder, a hub id (owner/name) or builtin")
    return name


def dtype_for(name: str) -> torch.dtype:
    """Return the dtype that `name` stands for.

    `auto` is bf16 where the hardware multiplies it (other CPUs take 2.7 times as long).
    """
    if name != "auto":
        return DTYPES[name]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capable = torch.cpu.get_capabilities()
    return torch.bfloat16 if capable.get("amx_bf16") or capable.get("avx512_bf16") else torch.float32


def match_compute_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model that was stored quantised compute in the requested dtype, which transformers ignores."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or not quantizer.pre_quantized:
        return
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype  # type: ignore[assignment]
