"""What a method does in the course of training (LaMDA freezes), for the Trainer and for a loop written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from inlay.host import distributed
from inlay.host.layer import InlayLinear
from inlay.host.slot import restore_precision, trained_numbers


def step(model: nn.Module, t: float, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Let methods follow the training of `model` to its fraction `t`, and release what an `optimizer` need not keep.

    Call it before the first optimiser step, also of a run that is resumed, and after every one.

    What a method freezes at t stays bit for bit as it is: no gradient is computed for it, and no optimiser moves it.
    What it begins anew is trained as if it had been made at t.

    Args:
        model: adapted, also within DDP or torch.compile; only its active adapters are looked at.
        t: the fraction of all optimiser steps that is done, 0 to 1.
        optimizer: if given, its state is released for what is frozen now, and forgotten for what begins anew.

    Returns:
        How many entries of the model's parameters are still trained.

    Raises:
        ValueError: t is not in [0, 1].
    """
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t={t} is not the fraction of the training that is done: it must be in [0, 1]")
    for module in model.modules():
        if not isinstance(module, InlayLinear):
            continue
        for weight, mask in module.advance(t):
            if optimizer is not None:
                forget(optimizer, weight, mask)
    return trained_numbers(model)


def forget(optimizer: torch.optim.Optimizer, weight: nn.Parameter, mask: Tensor | None) -> None:
    """Drop an optimiser's state of a parameter, or set it to 0 for the entries of a mask.

    All of it is dropped too where it is not of the parameter's shape entry by entry, as of 8-bit optimisers.
    """
    state = optimizer.state.get(weight)
    moments = [v for v in (state or {}).values() if isinstance(v, Tensor) and v.dim()]
    if mask is None or not all(v.shape == weight.shape and v.is_floating_point() for v in moments):
        optimizer.state.pop(weight, None)
    else:
        for moment in moments:
            distributed.own_shard(moment)[distributed.own_shard(distributed.as_lies(mask, moment))] = 0


class Schedule(TrainerCallback):
    """Call `step` in transformers' Trainer and trl's trainers: `Trainer(..., callbacks=[Schedule()])`.

    On a quantised base it also keeps θ in fp32, which trl would cast to bf16 (in DDP only where it is among the
    `callbacks` that the trainer is made with).
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        restore_precision(model)  # before there is an optimiser, or DDP

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not torch.distributed.is_initialized():  # for a callback that was added later
            restore_precision(model)
        self.on_step_end(args, state, control, model, **kwargs)  # a resumed run continues where its schedule was

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        step(model, min(1.0, state.global_step / max(1, state.max_steps)), optimizer)
