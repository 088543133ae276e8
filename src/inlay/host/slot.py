"""One stored tensor of θ, and the precision it keeps."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class Slot(nn.Module):
    """One tensor of θ (a parameter) or one that is never trained (a buffer: sharded savers drop frozen parameters).

    A leaf module with a `.weight`, because wrapping policies, hot swap and PEFT's key mapping look for that.
    """

    def __init__(self, value: Tensor, trainable: bool) -> None:
        super().__init__()
        if trainable:
            self.weight = nn.Parameter(value)
        else:
            self.register_buffer("weight", value)
        self.exact: Tensor | None = None  # the same memory under a second name, where a cast of θ is to be undone

    def forward(self) -> Tensor:
        return self.weight

    def restore(self) -> None:
        """Give a parameter that was cast to half precision its fp32 numbers back, where nothing else changed them."""
        weight, exact, self.exact = self._parameters.get("weight"), self.exact, None
        if weight is None or exact is None or weight.dtype == exact.dtype:
            return
        exact = exact.to(weight.device)
        same = exact.shape == weight.shape and torch.equal(exact.to(weight.dtype), weight.data)
        weight.data = exact if same else weight.data.to(exact.dtype)

    def freeze(self) -> nn.Parameter | None:
        """Make a parameter a buffer with the same numbers, and give it back for its optimiser to forget.

        A buffer, because PEFT turns gradients back on whenever adapters are switched, and sharded savers drop
        parameters without gradients. The optimiser's groups keep the parameter, so its checkpoints still fit.
        """
        if "weight" not in self._parameters:
            return None
        weight = cast(nn.Parameter, self.weight)
        del self.weight
        self.register_buffer("weight", weight.detach())
        weight.requires_grad_(False).grad = None
        return weight


def restore_precision(model: nn.Module) -> None:
    """Give θ its fp32 numbers back, which trl's trainers cast to bf16 when the base is quantised."""
    for module in model.modules():
        if isinstance(module, Slot):
            module.restore()
