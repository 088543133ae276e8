"""Optimisers by name: transformers' own, two more from the libraries that have them, and one that none has.

Muon (torch) and Scion (pytorch_optimizer) orthogonalise the update of a matrix. Scion is unconstrained: constrained, it
shrinks what it trains in every step, and our tensors may hold a pretrained weight. GaLore and Apollo (transformers'
names, from galore_torch and apollo_torch) project the gradients of whole weights: they are for full fine-tuning. Online
Subspace Descent (`inlay.numerics.subspace_descent`) does so where a matrix is wide enough for its rank, and takes
adapters too.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.training_args import OptimizerNames

from inlay.messages import did_you_mean
from inlay.numerics.subspace_descent import SubspaceDescent

OWN = {"muon": (2,), "scion": (1, 2), "subspace_descent": ()}  # and how many dimensions a parameter may have (any)
PROJECTING = ("galore", "apollo")
DEAF = ("adamw_torch", "adamw_torch_fused", "adafactor")  # transformers gives them no arguments
PACKAGES = {"scion": "pytorch_optimizer", "galore": "galore_torch", "apollo": "apollo_torch"}


def check_optimizer(name: str, full: bool, args: dict[str, Any]) -> None:
    """Refuse an optimiser that is unknown, not installed, or not for this: `full` fine-tuning, or adapters; or `args`
    that it would pass over.

    Raises:
        ValueError: it is one of these.
    """
    known = [*(member.value for member in OptimizerNames), *OWN]
    if name not in known:
        raise ValueError(f"optimizer: transformers has no {name!r}; {did_you_mean(name, known)}")
    if args and name in DEAF:
        raise ValueError(f"optimizer_args: {name} takes none; adam_beta1, adam_beta2 and adam_epsilon go in trainer")
    kind = name.partition("_")[0]
    if kind in PROJECTING and not full:
        raise ValueError(
            f"optimizer: {name} projects the gradients of whole weights and is for method full; an adapter's are "
            "small already"
        )
    if kind in PACKAGES and find_spec(PACKAGES[kind]) is None:
        raise ValueError(f"optimizer: {name} needs {PACKAGES[kind]}; pip install {PACKAGES[kind].replace('_', '-')}")


def optimizer_settings(name: str, args: dict[str, Any], targets: Any) -> dict[str, Any]:
    """An optimiser as fields of transformers' TrainingArguments."""
    if name in OWN:
        return {}
    if name.startswith("galore"):
        from galore_torch.galore_projector import GaLoreProjector

        torch.serialization.add_safe_globals([GaLoreProjector])  # numbers, in a class of its own, in its checkpoints
    text = ",".join(f"{key}={value}" for key, value in args.items())
    projecting = {"optim_target_modules": targets} if name.startswith(PROJECTING) else {}
    return {"optim": name, **projecting, **({"optim_args": text} if text else {})}


def own_optimizer(name: str, lr: float, args: dict[str, Any]) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """What transformers has no name for, and what it is made with; None for all others."""
    if name == "muon":  # with a step as long as AdamW's, so that AdamW's rates serve
        return torch.optim.Muon, {"lr": lr, "adjust_lr_fn": "match_rms_adamw", **args}
    if name == "subspace_descent":
        return SubspaceDescent, {"lr": lr, **args}
    if name != "scion":
        return None
    from pytorch_optimizer import SCION
    from pytorch_optimizer.optimizer.scion import LMONorm

    if args.get("constraint"):
        raise ValueError("optimizer_args: constraint shrinks what is trained, which may hold a pretrained weight")
    # An enum is no number to torch.load, which runs no code.
    return SCION, {"lr": lr, "constraint": False, "norm_type": int(LMONorm.AUTO), **args}


def check_shapes(name: str, model: nn.Module) -> None:
    """Raise a ValueError where an optimiser cannot take, or would misread, the shape of what a model trains."""
    for path, p in model.named_parameters() if OWN.get(name) else ():
        if p.requires_grad and p.ndim not in OWN[name]:
            raise ValueError(
                f"optimizer: {name} is for {'vectors and ' if 1 in OWN[name] else ''}matrices, and {path} has shape "
                f"{tuple(p.shape)}; use adamw_torch, or a method that trains such alone"
            )
