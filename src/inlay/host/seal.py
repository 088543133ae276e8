"""Seals: what an adapter holds and what it was cut from, in a few characters per layer, so that neither changes unseen.

A base is known by all of its weight, rounded to bf16, so that the same base loaded in fp32 or bf16 is the same: a
digest of a sample, and one of sums over every byte, which no changed number leaves as they were and which take a few
seconds for 10 GB on one core. Marks are checksums and no signatures. A quantised weight has a mark only where something
was folded into it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import torch
from torch import Tensor

SAMPLE = 1 << 16  # entries of a weight whose places count too
LANES = 1021  # a prime: rows or columns that trade places do not fall into the same sums
CHUNK = LANES << 14  # words that are summed at a time, as a rounded copy


def of_tensors(tensors: dict[str, Tensor]) -> str:
    """Return a digest of named tensors, whatever float dtype they are kept in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        wide = torch.float32 if tensor.is_floating_point() else tensor.dtype
        digest.update(tensor.detach().to("cpu", wide).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def of_base(W: Tensor) -> str:
    """Return a mark of a weight. fp16 has its own, because rounding to it loses what bf16 keeps."""
    kind = "float16" if W.dtype == torch.float16 else "bfloat16"
    sample = W.detach().flatten()[:: max(1, W.numel() // SAMPLE)].to("cpu", torch.bfloat16)
    digest = hashlib.sha256(str(tuple(W.shape)).encode() + sample.view(torch.int16).numpy().tobytes())
    return f"{kind}:{digest.hexdigest()[:16]}:{sums(W.detach(), torch.bfloat16)}"


def sums(tensor: Tensor, dtype: torch.dtype) -> str:
    """Return a digest of the bytes of a tensor in `dtype`, as 64-bit words that are summed modulo 2⁶⁴ in lanes."""
    flat, size = tensor.flatten(), 8 // dtype.itemsize
    total = torch.zeros(LANES, dtype=torch.int64, device=tensor.device)
    parts = flat.split(CHUNK * size) if len(flat) else ()
    for part in parts:
        part, short = part.to(dtype).contiguous(), -len(part) % (size * LANES)
        if short or part.storage_offset() % size:  # a view of words has to start at one
            part = torch.nn.functional.pad(part, (0, short))
        total += part.view(torch.int64).view(-1, LANES).sum(0)
    return hashlib.sha256(total.cpu().numpy().tobytes()).hexdigest()[:16]


def of_packed(weight: Tensor) -> str | None:
    """Return a mark of a quantised weight as it is stored; None where its bytes are not here."""
    if weight.is_meta or not hasattr(weight, "quant_state"):
        return None if weight.is_meta else type(weight).__name__
    state = cast(Any, weight).quant_state
    digest = hashlib.sha256(f"{tuple(state.shape)}{state.blocksize}".encode())
    for part in (weight.data, state.absmax):
        sample = part.detach().flatten()[:: max(1, part.numel() // SAMPLE)].cpu()
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    whole = "".join(sums(part.detach(), part.dtype) for part in (weight.data, state.absmax))
    return f"{state.quant_type}:{digest.hexdigest()[:16]}:{whole}"


def of_values(values: Any) -> str:
    """Return a digest of hyperparameters."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def is_plain_tensor(tensor: Tensor) -> bool:
    """Return whether a tensor's own values are here: not sharded, wrapped or on the meta device."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


def same_kind(one: str | None, other: str | None) -> bool:
    """Return whether two marks can tell bases apart, or the first is unknown."""
    return one is None or (other is not None and one.partition(":")[0] == other.partition(":")[0])


def same_base(one: str | None, other: str | None) -> bool:
    """Return whether two marks may be of one base; marks of different kinds, or none, cannot tell.

    Older adapters have the mark of the sample alone, with which that of the whole begins.
    """
    if one is None or other is None or not same_kind(one, other):
        return True
    return f"{one}:".startswith(f"{other}:") or f"{other}:".startswith(f"{one}:")
