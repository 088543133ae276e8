"""What a tensor holds, in 64 characters: SHA-256 of its dtype, shape and bytes. Equal content, equal fingerprint.

Other than a seal, which looks at a rounded sample so that a base is the same in fp32 and bf16, this sees every bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from inlay.workbench.weights import Weights

CHUNK = 1 << 26  # bytes hashed at a time: a tensor on a GPU is never copied whole


def of_tensor(tensor: Tensor) -> str:
    """The fingerprint of one tensor, of any dtype and shape, wherever it lies.

    Raises:
        ValueError: it is on the meta device and holds nothing.
    """
    if tensor.is_meta:
        raise ValueError(
            f"a meta tensor of shape {tuple(tensor.shape)} has no content to fingerprint; load its weights"
        )
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().reshape(-1)
    for part in flat.split(CHUNK // flat.element_size()) if len(flat) else ():
        digest.update(cast(Any, part.cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A fingerprint per tensor; an iterator's tensors are held one at a time."""
    return {name: of_tensor(tensor) for name, tensor in named}


def of_model(model: str, revision: str | None = None) -> dict[str, str]:
    """A fingerprint per tensor of a model (hub id, folder or builtin), as its checkpoint names and stores them.

    Raises:
        ValueError: the model has no safetensors files, or they cannot be read.
    """
    weights = Weights(model, revision)
    return of_tensors((name, weights.read(name)) for name in weights.names())
