"""The starts of PEFT's LoRAs that change the base: PiSSA and its relatives.

They train B A on W − s B₀ A₀, of which PEFT stores B and A alone: at every load it makes the start again, from the base
it is given. A start that is a function of W comes out the same, as a product; a random one does not, and PEFT then
computes with other weights than it was trained on, without a word.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from transformers import Conv1D

PLAIN = ("true", "false", "gaussian", "eva", "orthogonal", "mica")  # they leave the base's weights as they are
COMPUTED = ("pissa", "olora")  # functions of W
LOST = {"pissa_niter_": "is a random decomposition", "corda": "came from data", "lora_ga": "came from gradients"}


def moves_base(start: str, given: bool) -> bool:
    """Return whether the adapter was trained on W − s B₀ A₀; `given`: the adapter before training is at hand.

    Raises:
        ValueError: it was, and the start is lost; or it was not, and one is given.
    """
    if given:
        if start in PLAIN and start != "true":
            raise ValueError(f"init_lora_weights={start!r} leaves the base as it is; leave out the initial adapter")
        return True  # also where it says true: PEFT wants that of the saved start, and keeps it in the model's config
    if start in (*PLAIN, *COMPUTED):
        return start in COMPUTED
    for kind, why in LOST.items():
        if start.startswith(kind):
            raise ValueError(
                f"init_lora_weights={start!r} {why}, which PEFT does not store, and it was trained on the base less "
                "that start; give the adapter as it was saved before training (--initial)"
            )
    if start == "loftq":
        raise ValueError(
            "init_lora_weights='loftq' quantises the base when it is loaded; save that base and the adapter with "
            "init_lora_weights=True, and import that"
        )
    raise ValueError(f"init_lora_weights={start!r} is not one of {', '.join((*PLAIN, *COMPUTED, *LOST))}")


def count_owners(model: nn.Module) -> Counter[int]:
    """Count the modules that hold each `weight`, by its id: tied weights have several."""
    parameters = ((name, p) for m in model.modules() for name, p in m.named_parameters(recurse=False))
    return Counter(id(p) for name, p in parameters if name == "weight")


def check_peft_start(start: str, layers: dict[str, nn.Module], model: nn.Module) -> None:
    """Raise a ValueError where PEFT's own model is not W − s B₀ A₀ + s B A on these layers alone."""
    owners = count_owners(model)
    for name, layer in layers.items():
        if owners[id(layer.weight)] > 1:
            raise ValueError(
                f"{name} shares its weight with another module, from which PEFT took {start}'s start as well"
            )
        if start == "olora" and isinstance(layer, Conv1D):
            raise ValueError(f"{name} is a Conv1D, whose OLoRA start PEFT subtracts untransposed; it has no equal here")


def compute_peft_start(start: str, W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor, float]:
    """Compute A₀, B₀ of a weight (out × in) in fp32, and how far s B₀ A₀ may be from another LAPACK's, over its norm.

    Factors differ in signs at most, which the product does not know, unless σ_r = σ_r+1 (PiSSA; Wedin's theorem), or
    the first r columns of W are dependent (OLoRA): then the subspace itself is a matter of rounding.
    """
    W, eps = W.float(), torch.finfo(torch.float32).eps
    if start == "olora":
        Q, R = torch.linalg.qr(W)
        pivots = R.diagonal()[:r].abs()
        return R[:r], Q[:, :r], min(1.0, (eps * pivots.max() / pivots.min()).item())
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    doubt = 0.0 if r >= len(S) else (eps * S[0] / (S[r - 1] - S[r]) * S[r - 1] / S[:r].norm()).item()
    root = (S[:r] / s).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root, min(1.0, doubt)


def aligned_signs(A0: Tensor, B0: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Give a start the signs of what was trained from it. The product has none, but B − B₀ rounds better in bf16."""
    sign = torch.where((A * A0).sum(1) < 0, -1.0, 1.0)
    return sign[:, None] * A0, B0 * sign


def base_distance(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, name: str) -> float:
    """Return the distance that training moved a start: ‖B A − B₀ A₀‖ / ‖B₀ A₀‖.

    Raises:
        ValueError: the start is zero.
    """
    start = B0 @ A0
    if not start.any():
        raise ValueError(f"{name}: the initial adapter is zero, as a plain LoRA's is; leave it out")
    return ((B @ A - start).norm() / start.norm()).item()


def start_notes(start: str, moved: float, base: str | None, doubt: float) -> list[str]:
    """Return what to know of an adapter imported against its start; `base`: the model the start was computed from."""
    notes = []
    if base is not None:
        notes.append(
            f"its start was computed from {base}; training moved it by {moved:.1%} of its norm at most (if that is far "
            "more than expected, it was another base, or a quantised one)"
        )
    if doubt > 1e-3:
        notes.append(f"its start is ill-determined: on another machine it may have differed by {doubt:.1%} of its norm")
    if not start.startswith("pissa"):
        notes.append("its start is no method here: it is part of a LoRA of twice the rank, and is trained on with it")
    return notes
