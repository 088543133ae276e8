"""One stored tensor of θ, and the precision it keeps."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Slot(nn.Module):
    """Hold one tensor of θ: a parameter, or a buffer where it is never trained (sharded savers drop such parameters).

    A leaf module with a `.weight`, because wrapping policies, hot swap and PEFT's key mapping look for that.
    """

    def __init__(self, value: Tensor, trainable: bool) -> None:
        super().__init__()
        if trainable:
            self.weight = nn.Parameter(value)
        else:
            self.register_buffer("weight", value)
        self.exact: Tensor | None = None  # the weight's memory under a second name, where a cast is to be undone
        self.held = False  # a sharded parameter that is frozen
        self.resting: list[nn.Parameter] = []  # the parameter, while it is frozen: where torch does not see it

    def forward(self) -> Tensor:
        return self.weight.detach() if self.held else self.weight

    @property
    def parameter(self) -> nn.Parameter | None:
        """Return the weight, where it is a parameter."""
        return next(self.parameters(recurse=False), None)

    def restore(self) -> None:
        """Give a parameter that was cast to half precision its fp32 values back, where nothing else changed them."""
        weight = self.parameter
        if weight is not None and self.exact is not None:
            weight.data = self.exact = uncast(weight.data, self.exact)

    def watch(self) -> None:
        """Remember this parameter's values, so that a cast of it can be undone."""
        self.exact = None if self.parameter is None else self.parameter.data

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # a move, or a cast that is meant
        self.watch() if self.exact is not None else None
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.watch() if self.exact is not None else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, whose parameters have memory of their own
        self.watch() if self.exact is not None and self.exact.dtype == self.weight.dtype else None

    def freeze(self) -> nn.Parameter | None:
        """Make a parameter a buffer with the same values, and return it for its optimiser to forget.

        A buffer, because PEFT turns gradients back on whenever adapters are switched, and sharded savers drop
        parameters without gradients. The optimiser's groups keep the parameter, so its checkpoints still fit. One that
        FSDP2 shards is FSDP2's to gather: it stays a parameter, but no gradient reaches it, on any process.
        """
        weight = self.parameter
        if weight is None or self.held:
            return None
        if isinstance(weight, DTensor):
            self.held, weight.grad = True, None
            return weight
        del self.weight
        self.register_buffer("weight", weight.detach())
        weight.requires_grad_(False).grad = None
        self.resting = [weight]
        return weight

    def thaw(self) -> None:
        """Make what `freeze` froze the same parameter again, with the values that it has by now."""
        self.held = False
        if self.resting:
            weight, now = self.resting.pop(), self.weight.data
            del self.weight
            weight.data = now
            self.weight = weight.requires_grad_()

    def is_empty(self) -> bool:
        """Return whether nothing has filled this slot: it is meta, or holds NaN, or the least integer."""
        w = self.weight
        return w.is_meta or bool((w.isnan() if w.is_floating_point() else w == torch.iinfo(w.dtype).min).any())


def trained_numbers(model: nn.Module) -> int:
    """Return how many entries of a model's parameters are trained."""
    held = sum(slot.weight.numel() for slot in model.modules() if isinstance(slot, Slot) and slot.held)
    return (
        sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad) - held
    )  # ZeRO-3's parts


def uncast(value: Tensor, exact: Tensor) -> Tensor:
    """Return `exact`, if `value` is a rounding of it, else `value` in its dtype."""
    exact = exact.to(value.device)
    same = exact.shape == value.shape and torch.equal(exact.to(value.dtype), value)
    return exact if same else value.to(exact.dtype)


def restore_precision(model: nn.Module) -> None:
    """Give what is trained its own dtype and values back: trl casts it to bf16 when the base is quantised."""
    for module in model.modules():
        if isinstance(module, Slot):
            module.restore()
        elif isinstance(module, ModulesToSaveWrapper):
            for own in module.modules_to_save.values():
                for p, first in zip(own.parameters(), module.original_module.parameters(), strict=True):
                    if p.dtype != first.dtype and p.is_floating_point():
                        p.data = uncast(p.data, first.data).clone()
