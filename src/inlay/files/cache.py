"""Tensors that took long to compute, on disk under what they were computed from; a damaged entry is none."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DAY = 86_400  # seconds
LIMIT = 10 << 30  # bytes of a kind; what was not used for longest goes first
CHUNK = 1 << 26  # bytes hashed at a time: a tensor on a GPU is never copied whole


def cache_folder() -> Path:
    """Where things are kept that can be made again: $INLAY_CACHE, or ~/.cache/inlay."""
    return Path(os.environ.get("INLAY_CACHE") or "~/.cache/inlay").expanduser()


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, wherever it lies.

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
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(kind: str, key: str) -> dict[str, Tensor] | None:
    """What `store` was given, in its order, on the CPU; None if it is not there, or not whole."""
    path = cache_folder() / kind / f"{key}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            marks = dict(json.loads((file.metadata() or {})["fingerprints"]))
            tensors = {name: file.get_tensor(name) for name in marks}
        os.utime(path)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        return None
    return tensors if all(fingerprint(t) == marks[name] for name, t in tensors.items()) else None


def store(kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors for `load`. A cache that cannot be written costs time, and a warning, only."""
    folder = cache_folder() / kind
    part = folder / f".{key}.{uuid.uuid4().hex}.part"
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    marks = {name: fingerprint(tensor) for name, tensor in whole.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(whole, part, {"fingerprints": json.dumps(marks)})
        os.replace(part, folder / f"{key}.safetensors")
        _prune(folder)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True) if folder.is_dir() else None
        reason = getattr(error, "strerror", None) or error
        warnings.warn(
            f"{folder} cannot be written ({reason}), so {kind} are computed anew each time; "
            "name another folder in INLAY_CACHE",
            stacklevel=2,
        )


def _prune(folder: Path) -> None:
    now, entries = time.time(), []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process prunes too
            entries.append((file.stat(), file))
    room = LIMIT
    for stat, file in sorted(entries, key=lambda entry: entry[0].st_mtime, reverse=True):
        if file.suffix == ".safetensors":
            room -= stat.st_size
        dead = file.suffix == ".part" and stat.st_mtime < now - DAY  # of a process that was killed
        if dead or (file.suffix == ".safetensors" and room < 0):
            file.unlink(missing_ok=True)
