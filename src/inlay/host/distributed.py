"""The processes of one run, which accelerate or torch's launcher started: who writes, and what all must agree on.

In a run of one process everything here is what it says, and costs nothing.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # of processes that wait, for spectra, data or an upload; torch gives NCCL ten minutes


class Elsewhere(Exception):  # noqa: N818 (it is no error of this process)
    """Signal that another process of the run has ended, or will report what is wrong."""


def launched() -> bool:
    """Return whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def fsdp() -> bool:
    """Return whether FSDP is to shard the model among the processes."""
    return launched() and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def deepspeed() -> bool:
    """Return whether DeepSpeed is to shard the model among the processes."""
    return launched() and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def sharded() -> bool:
    """Return whether accelerate is to shard the model among the processes."""
    return fsdp() or deepspeed()


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the processes of a run in this block, so that they can exchange tensors.

    Raises:
        Elsewhere: one of the others ended while this one waited for it.
    """
    if not launched() or PartialState._shared_state:
        yield
        return
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    allow_sharding(state)
    try:
        yield
        dist.barrier()
    except RuntimeError as error:
        if lost(error):
            raise Elsewhere("another process of the run has ended") from error
        raise
    state.destroy_process_group()


def allow_sharding(state: PartialState) -> None:
    """Let accelerate shard on a CPU too, as torch can, so that a CPU can run what GPUs would."""
    if state.distributed_type == DistributedType.MULTI_CPU and fsdp():
        state.distributed_type = DistributedType.MULTI_GPU  # all states of the process share it


def lost(error: BaseException) -> bool:
    """Return whether an error means that the process at the other end is gone."""
    return launched() and isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)


# What gloo and NCCL say of it.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Socket closed",
)

LOST += ("Connection refused", "Connection was likely closed", "Read timeout", "ncclRemoteError", "Timed out waiting")


def process_count() -> int:
    """Return how many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this is the process that writes and reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(make: Callable[[], T]) -> T:
    """Return what the first process makes, in all of them; where it fails, so do they.

    Raises:
        Elsewhere: in the other processes, if the first one could not make it.
    """
    if process_count() == 1:
        return make()
    outcome: list[Any] = [False, None]
    try:
        if is_first():
            outcome = [True, make()]
    finally:
        dist.broadcast_object_list(outcome, src=0)
    if not outcome[0]:
        raise Elsewhere("the first process has said why")
    return outcome[1]


def in_turn(make: Callable[[], T]) -> T:
    """Return what each process makes for itself, after the first one could."""
    results: list[T] = []
    from_first(lambda: results.append(make()))
    return results[0] if results else make()


def gather_values(value: T) -> list[T]:
    """Return the `value` of each process, in their order."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def in_any(flag: bool) -> bool:
    """Return whether `flag` is true in any of the processes."""
    if process_count() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.int32, device=PartialState().device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if process_count() > 1:
        dist.barrier()


def broadcast_tensors(tensors: dict[str, Tensor], source: int) -> dict[str, Tensor]:
    """Return the tensors of the process `source`, in all; those of the others give shapes, dtypes and devices."""
    received = {}
    for name, tensor in tensors.items():
        there = tensor.to(PartialState().device).contiguous()
        dist.broadcast(there, src=source)
        received[name] = there.to(tensor.device)
    return received


def is_shard(tensor: Tensor) -> bool:
    """Return whether FSDP2 or ZeRO-3 shards a tensor."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def own_shard(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    if hasattr(tensor, "ds_id"):
        return cast(Any, tensor).ds_tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor, in every process, on the CPU if it was sharded."""
    if hasattr(tensor, "ds_id"):
        with importlib.import_module("deepspeed").zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone()
    return tensor.full_tensor().detach().cpu() if isinstance(tensor, DTensor) else tensor.detach()


def as_lies(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every process has, sharded as `like` is if that is sharded and of the same shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def borrowed(tensor: Tensor) -> Tensor:
    """Return all of a tensor that a layer holds for others, which FSDP2 gathers for that layer alone.

    Its gradient is the mean over the processes, as FSDP2's are.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda slope: slope / process_count())
    return whole


class Gathered(dict[str, Tensor]):
    """Map names to tensors, each gathered whole in every process when it is read.

    `scatter` writes back what was changed in them, in all processes alike.
    """

    def __init__(self, held: dict[str, Tensor]) -> None:
        super().__init__()
        self.held = held

    def __missing__(self, name: str) -> Tensor:
        tensor = self.held[name]
        self[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return self[name]

    def scatter(self) -> None:
        """Write changed tensors back to where they are kept."""
        for name, tensor in self.items():
            if tensor is not (held := self.held[name]):
                held.copy_(as_lies(tensor, held))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict with what is trained gathered whole, to save an adapter; the rest stays sharded."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: whole_tensor(trained[name]) if name in trained else t for name, t in model.state_dict().items()}
