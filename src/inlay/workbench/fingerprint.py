"""What tensors hold, in 64 characters each. Equal content, equal fingerprint.

Other than a seal, which looks at a rounded sample so that a base is the same in fp32 and bf16, this sees every bit.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from inlay.cache import fingerprint as of_tensor
from inlay.workbench.weights import Weights


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
