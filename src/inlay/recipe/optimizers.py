"""Choose optimisers by name: transformers' own, two from other libraries, and Online Subspace Descent.

Muon (torch) and Scion (pytorch_optimizer) orthogonalise the update of a matrix. Scion is unconstrained here:
constrained, it shrinks what it trains in every step, and Inlay's tensors may hold a pretrained weight. GaLore and
Apollo (transformers' names, from galore_torch and apollo_torch) project the gradients of whole weights, so they are for
full fine-tuning. Online Subspace Descent (`inlay.numerics.subspace_descent`) projects where a matrix is wide enough for
its rank, so it takes adapters too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.training_args import OptimizerNames

from inlay.messages import check_installed, did_you_mean
from inlay.numerics.subspace_descent import SubspaceDescent

# The optimisers that transformers does not name, and how many dimensions a parameter of theirs may have; (): any.
DIMENSIONS = {"muon": (2,), "scion": (1, 2), "subspace_descent": ()}
PROJECTING = ("galore", "apollo")
WITHOUT_ARGS = ("adamw_torch", "adamw_torch_fused", "adafactor")  # transformers passes them no arguments
PACKAGES = {"scion": "pytorch_optimizer", "galore": "galore_torch", "apollo": "apollo_torch"}


def check_optimizer(name: str, full: bool, args: dict[str, Any]) -> None:
    """Refuse an optimiser that is unknown, not installed, or unsuited to the run.

    Args:
        name: as in a recipe's `optimizer`.
        full: whether the run trains the whole model, not an adapter.
        args: the recipe's `optimizer_args`, refused where they would be ignored.

    Raises:
        ValueError: the optimiser cannot be used.
    """
    names = [*(member.value for member in OptimizerNames), *DIMENSIONS]
    if name not in names:
        raise ValueError(f"optimizer: transformers has no {name!r}; {did_you_mean(name, names)}")
    if args and name in WITHOUT_ARGS:
        raise ValueError(
            f"optimizer_args: {name} takes none; put adam_beta1, adam_beta2 and adam_epsilon under trainer"
        )
    kind = name.partition("_")[0]
    if kind in PROJECTING and not full:
        raise ValueError(
            f"optimizer: {name} projects the gradients of whole weights, so it is for method full; an adapter's "
            "gradients are small already"
        )
    if kind in PACKAGES:
        check_installed(f"optimizer: {name}", PACKAGES[kind])


def optimizer_settings(name: str, args: dict[str, Any], targets: list[str] | str) -> dict[str, Any]:
    """Return an optimiser's name, arguments and target modules as fields of transformers' TrainingArguments."""
    if name in DIMENSIONS:
        return {}
    if name.startswith("galore"):
        from galore_torch.galore_projector import GaLoreProjector

        torch.serialization.add_safe_globals([GaLoreProjector])  # its checkpoints hold one, with plain numbers in it
    text = ",".join(f"{key}={value}" for key, value in args.items())
    projecting = {"optim_target_modules": targets} if name.startswith(PROJECTING) else {}
    return {"optim": name, **projecting, **({"optim_args": text} if text else {})}


def is_own_optimizer(name: str) -> bool:
    """Return whether transformers does not name an optimiser, so that a trainer has to take its class."""
    return name in DIMENSIONS


def own_optimizer(name: str, lr: float, args: dict[str, Any]) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """Return the class and arguments of an optimiser that transformers does not name; None for all others."""
    if name == "muon":  # steps scaled to AdamW's length, so that AdamW's learning rates fit
        return torch.optim.Muon, {"lr": lr, "adjust_lr_fn": "match_rms_adamw", **args}
    if name == "subspace_descent":
        return SubspaceDescent, {"lr": lr, **args}
    if not is_own_optimizer(name):
        return None
    from pytorch_optimizer import SCION
    from pytorch_optimizer.optimizer.scion import LMONorm

    if args.get("constraint"):
        raise ValueError("optimizer_args: constraint shrinks what is trained, which may hold a pretrained weight")
    # A checkpoint with an enum would not load: torch.load with weights_only=True takes plain numbers.
    return SCION, {"lr": lr, "constraint": False, "norm_type": int(LMONorm.AUTO), **args}


def check_shapes(name: str, model: nn.Module) -> None:
    """Raise a ValueError where an optimiser cannot take, or would misread, the shape of a trained parameter."""
    dimensions = DIMENSIONS.get(name)
    if not dimensions:
        return
    for path, p in model.named_parameters():
        if p.requires_grad and p.ndim not in dimensions:
            raise ValueError(
                f"optimizer: {name} is for {'vectors and ' if 1 in dimensions else ''}matrices, and {path} has shape "
                f"{tuple(p.shape)}; use adamw_torch, or a method that trains only such shapes"
            )
