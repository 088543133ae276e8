"""Keep tensors that took long to compute on disk, named by what they were computed from; ignore damaged entries."""

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

from inlay.files.untrusted import regular_file, user_path

DAY = 86_400  # seconds
LIMIT = 10 << 30  # bytes per kind; the least recently used entries are deleted first
CHUNK = 1 << 26  # bytes hashed at a time, so that a tensor on a GPU is never copied whole


def cache_folder() -> Path:
    """Return the folder for data that can be computed again: $INLAY_CACHE, or ~/.cache/inlay.

    Where a user has no home, as in a container, it is one that nobody can write.
    """
    path = user_path(os.environ.get("INLAY_CACHE") or "~/.cache/inlay")
    return Path(os.devnull, "no home folder") if path.parts[0].startswith("~") else path


def fingerprint(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes, on any device.

    Raises:
        ValueError: the tensor is on the meta device and has no content.
    """
    if tensor.is_meta:
        raise ValueError(
            f"a meta tensor of shape {tuple(tensor.shape)} has no content to fingerprint; load its weights"
        )
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().reshape(-1)
    if len(flat):
        for part in flat.split(CHUNK // flat.element_size()):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(kind: str, key: str) -> dict[str, Tensor] | None:
    """Return the tensors that `store` kept as `kind` and `key`, in order and on the CPU; None if missing or damaged."""
    path = cache_folder() / kind / f"{key}.safetensors"
    try:
        with safe_open(regular_file(path), "pt") as file:
            fingerprints = dict(json.loads((file.metadata() or {})["fingerprints"]))
            tensors = {name: file.get_tensor(name) for name in fingerprints}
        with suppress(OSError):  # a cache that cannot be written is read all the same
            os.utime(path)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        return None
    return tensors if all(fingerprint(t) == fingerprints[name] for name, t in tensors.items()) else None


def store(kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep `tensors` for `load` as `kind` and `key`; only warn if the cache cannot be written."""
    folder = cache_folder() / kind
    part = folder / f".{key}.{uuid.uuid4().hex}.part"
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    fingerprints = {name: fingerprint(tensor) for name, tensor in copies.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(copies, part, {"fingerprints": json.dumps(fingerprints)})
        os.replace(part, folder / f"{key}.safetensors")
        _prune(folder)
    except (OSError, SafetensorError) as error:
        if folder.is_dir():
            part.unlink(missing_ok=True)
        reason = (isinstance(error, OSError) and error.strerror) or error
        warnings.warn(
            f"{folder} cannot be written ({reason}), so {kind} are computed again each time; "
            "name another folder in INLAY_CACHE",
            stacklevel=2,
        )


def _prune(folder: Path) -> None:
    now, entries = time.time(), []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process prunes too
            entries.append((file.stat(), file))
    room = LIMIT  # bytes left
    for stat, file in sorted(entries, key=lambda entry: entry[0].st_mtime, reverse=True):
        if file.suffix == ".safetensors":
            room -= stat.st_size
        dead = file.suffix == ".part" and stat.st_mtime < now - DAY  # left by a process that was killed
        if dead or (file.suffix == ".safetensors" and room < 0):
            file.unlink(missing_ok=True)
