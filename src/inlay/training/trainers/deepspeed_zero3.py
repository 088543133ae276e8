"""Support DeepSpeed's ZeRO-3 under transformers' trainer.

A step waits until its gradient was checked, and the optimiser's state is saved as torch has it, so that a run can be
resumed with any number of processes and any engine. DeepSpeed itself steps within the backward pass, and saves one
pickle per process.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from inlay.host import distributed
from inlay.method import Method
from inlay.models.loading import dtype_for
from inlay.recipe.peft_methods import is_inlay
from inlay.recipe.recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


def tools() -> Any:
    """Return DeepSpeed's module for access to its shards."""
    return importlib.import_module("deepspeed.utils")


class Held:
    """Replace accelerate's backward pass, which steps at once, by one that leaves the step to the caller."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)


def hold(accelerator: Any) -> None:
    """Keep DeepSpeed from stepping within the backward pass from now on."""
    wrapper = accelerator.deepspeed_engine_wrapped
    wrapper.backward = Held(wrapper.engine).backward


def check_zero3(recipe: Recipe) -> None:
    """Refuse what ZeRO-3's flat shards do not support, or what DeepSpeed does in its own way."""
    use = "use recipes/distributed/fsdp2.yaml, which shards the same tensors"
    if dtype_for(recipe.dtype) != torch.float32:
        raise ValueError(
            f"dtype: DeepSpeed would round trained parameters as it rounds the base; float32 is exact, or {use}"
        )
    unsupported = [name for name in ("flat_noise", "lr_ratio", "core_ratio", "skip_nan") if vars(recipe)[name]]
    if recipe.step != "backward":
        unsupported.append("step")
    if recipe.optim != "adamw_torch":
        unsupported.append("optimizer")
    if unsupported:
        raise ValueError(f"{unsupported[0]}: not with DeepSpeed; {use}")
    if is_inlay(recipe.method):
        method = recipe.config().build()
        changes = type(method).schedule is not Method.schedule or type(method).restart is not Method.restart
        if changes or method.shared or method.penalises:
            why = "changes which parameters are trained" if changes else "has a penalty on what is trained"
            why = "shares tensors between layers" if method.shared else why
            raise ValueError(f"method: {recipe.method} {why}, which DeepSpeed's flat shards do not support; {use}")


def gathered_gradients(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the gradients of the trained parameters, as far as this process holds them."""
    get = tools().safe_get_local_grad
    gradients = [(name, get(p)) for name, p in model.named_parameters() if p.requires_grad]
    return [(name, grad) for name, grad in gradients if grad is not None]


def gather_state(optimizer: Any, weights: list[nn.Parameter], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the state of DeepSpeed's optimiser as `torch.optim.AdamW` would have it; every process has to call this.

    Args:
        optimizer: DeepSpeed's.
        weights: the parameters it trains, in their original order.
        groups: its original parameter groups, as torch's `state_dict` had them; DeepSpeed leaves empty ones out.
    """
    get = tools().safe_get_full_optimizer_state
    inner = optimizer.optimizer
    step = next(iter(inner.state.values()))["step"]
    kept = iter(inner.param_groups)
    current = [{**group, **next(kept), "params": group["params"]} if group["params"] else group for group in groups]
    moments = {i: {k: get(p, k).cpu() for k in MOMENTS} for i, p in enumerate(weights)}
    return {"state": {i: {"step": step.clone(), **both} for i, both in moments.items()}, "param_groups": current}


def load_state(optimizer: Any, weights: list[nn.Parameter], saved: dict[str, Any]) -> None:
    """Load the state that `gather_state` returned into DeepSpeed's optimiser."""
    get, put = tools().safe_get_local_optimizer_state, tools().safe_set_local_optimizer_state
    for flat in optimizer.fp32_partitioned_groups_flat:  # torch creates moments in the first step
        moments: dict[str, Tensor] = {key: torch.zeros_like(flat) for key in MOMENTS}
        optimizer.optimizer.state[flat] = {"step": saved["state"][0]["step"].clone(), **moments}
    for i, state in saved["state"].items():
        for key in MOMENTS:
            size = get(weights[i], key).numel()
            room = size * distributed.process_count()  # the last process's part may be padded
            parts = pad(state[key].flatten(), (0, room - state[key].numel())).split(size)
            put(weights[i], parts[dist.get_rank()], key)
    not_empty = [group for group in saved["param_groups"] if group["params"]]
    for group, saved_group in zip(optimizer.optimizer.param_groups, not_empty, strict=True):
        group.update({k: v for k, v in saved_group.items() if k != "params"})


def for_all(scheduler: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Extend a scheduler's state from the parameter groups that are not empty to all groups."""
    count = sum(bool(group["params"]) for group in groups)
    places = [max(0, sum(bool(group["params"]) for group in groups[: i + 1]) - 1) for i in range(len(groups))]
    return {k: [v[i] for i in places] if is_list(v, count) else v for k, v in scheduler.items()}


def for_own(scheduler: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Reduce a scheduler's state from all parameter groups to those that are not empty."""
    places = [i for i, group in enumerate(groups) if group["params"]]
    return {k: [v[i] for i in places] if is_list(v, len(groups)) else v for k, v in scheduler.items()}


def is_list(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count
