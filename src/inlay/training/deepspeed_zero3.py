"""DeepSpeed's ZeRO-3 under transformers' trainer: a step that waits until its gradient was looked at, and the state of
an optimiser as torch has it, so that a run goes on in any number of processes, with any engine.

DeepSpeed itself steps within the backward pass, and saves one pickle per process.
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

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def tools() -> Any:
    """What DeepSpeed has to look into its shards."""
    return importlib.import_module("deepspeed.utils")


class Held:
    """In place of accelerate's backward pass, which steps at once; `step` is left to who calls it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)


def hold(accelerator: Any) -> None:
    """From here on no step is taken in a backward pass."""
    wrapper = accelerator.deepspeed_engine_wrapped
    wrapper.backward = Held(wrapper.engine).backward


def check_zero3(recipe: Recipe) -> None:
    """Refuse what ZeRO-3's flat shards cannot follow, or DeepSpeed does in its own way."""
    use = "use recipes/distributed/fsdp2.yaml, which shards the same tensors"
    if dtype_for(recipe.dtype) != torch.float32:
        raise ValueError(
            f"dtype: DeepSpeed would round what is trained as it does the base; float32 is exact, or {use}"
        )
    asked = ("flat_noise", "lr_ratio", "skip_nan")
    given = [name for name in asked if getattr(recipe, name)] + (["step"] if recipe.step != "backward" else [])
    if recipe.optim != "adamw_torch":
        given.append("optimizer")
    if given:
        raise ValueError(f"{given[0]}: not with DeepSpeed; {use}")
    if is_inlay(recipe.method):
        method = recipe.config().build()
        moves = any(getattr(type(method), name) is not getattr(Method, name) for name in ("schedule", "restart"))
        if moves or method.shared:
            why = "changes what is trained on the way" if moves else "has tensors that layers share"
            raise ValueError(f"method: {recipe.method} {why}, which DeepSpeed's flat shards do not follow; {use}")


def gathered_gradients(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The gradients of what is trained, the parts that this process holds."""
    get = tools().safe_get_local_grad
    found = [(name, get(p)) for name, p in model.named_parameters() if p.requires_grad]
    return [(name, grad) for name, grad in found if grad is not None]


def gather_state(optimizer: Any, weights: list[nn.Parameter], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of DeepSpeed's optimiser as `torch.optim.AdamW` would have it; every process has to ask.

    Args:
        optimizer: DeepSpeed's.
        weights: what it trains, as it was given it.
        groups: its parameter groups as torch's `state_dict` had them then; DeepSpeed leaves empty ones out.
    """
    get, inner = tools().safe_get_full_optimizer_state, optimizer.optimizer
    step, own = next(iter(inner.state.values()))["step"], iter(inner.param_groups)
    now = [{**group, **next(own), "params": group["params"]} if group["params"] else group for group in groups]
    moments = {i: {k: get(p, k).cpu() for k in MOMENTS} for i, p in enumerate(weights)}
    return {"state": {i: {"step": step.clone(), **both} for i, both in moments.items()}, "param_groups": now}


def load_state(optimizer: Any, weights: list[nn.Parameter], saved: dict[str, Any]) -> None:
    """Put such a state back."""
    get, put = tools().safe_get_local_optimizer_state, tools().safe_set_local_optimizer_state
    for flat in optimizer.fp32_partitioned_groups_flat:  # torch makes them in the first step
        made: dict[str, Tensor] = {key: torch.zeros_like(flat) for key in MOMENTS}
        optimizer.optimizer.state[flat] = {"step": saved["state"][0]["step"].clone(), **made}
    for i, own in saved["state"].items():
        for key in MOMENTS:
            size = get(weights[i], key).numel()
            room = size * distributed.process_count()  # the last process's part may be longer than what is left for it
            parts = pad(own[key].flatten(), (0, room - own[key].numel())).split(size)
            put(weights[i], parts[dist.get_rank()], key)
    full = [group for group in saved["param_groups"] if group["params"]]
    for group, own in zip(optimizer.optimizer.param_groups, full, strict=True):
        group.update({k: v for k, v in own.items() if k != "params"})


def for_all(scheduler: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A scheduler's state for all parameter groups, of one that knows those which are not empty."""
    count = sum(bool(group["params"]) for group in groups)
    places = [max(0, sum(bool(group["params"]) for group in groups[: i + 1]) - 1) for i in range(len(groups))]
    return {k: [v[i] for i in places] if is_list(v, count) else v for k, v in scheduler.items()}


def for_own(scheduler: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The other way round."""
    places = [i for i, group in enumerate(groups) if group["params"]]
    return {k: [v[i] for i in places] if is_list(v, len(groups)) else v for k, v in scheduler.items()}


def is_list(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count
