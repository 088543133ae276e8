"""Both sides of all queries of a zeroth-order step in one pass of the model's layers, as in P-RGE.

"Parallelized randomized gradient estimation": θ differs from side to side, the frozen weights and the examples do not.
So the batch is repeated for every side, and each adapted layer makes one product with its base for all of them, then
the small change of each side at that side's θ. [ours]: θ is written layer by layer, from the seed, so that no direction
is stored; the head and the loss follow side by side, so that any trainer's loss serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from inlay.host.experts import InlayExperts
from inlay.host.layer import PREFIX, InlayLinear
from inlay.method import Base
from inlay.numerics import ops
from inlay.numerics.zeroth_order import ZerothOrder


class Known:
    """Stand for a base whose output for `x` is one part of what it gives for all sides.

    For another x (Bat's x + t) the base itself is called.
    """

    def __init__(self, base: Base, x: Tensor, whole: Callable[[], Tensor]) -> None:
        self.base = base
        self.x = x
        self.whole = whole

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.whole() if x is self.x else self.base(x)


@contextmanager
def spread_queries(
    model: nn.Module, estimator: ZerothOrder, parameters: Sequence[Tensor], own: Sequence[Tensor], step: int
) -> Iterator[None]:
    """Run the k-th forward pass of a causal language model at the k-th of `estimator.sides`, in this block.

    The first pass runs the layers for all sides. The block leaves θ at some side.

    Args:
        model: adapted; of a batch, matrices as long as the first one are repeated.
        estimator: the directions and sides of the step.
        parameters: θ.
        own: a copy of θ.
        step: the number of the step, from which the directions are drawn.

    Raises:
        ValueError: something is trained elsewhere than in adapted layers, or something drops at random.
    """
    causal = cast(Any, model.get_base_model() if isinstance(model, PeftModel) else model)
    body = causal.base_model
    sides = estimator.sides
    outputs = []
    calls = iter(range(len(estimator.sides)))
    layers = [module for module in body.modules() if isinstance(module, InlayLinear)]
    place = {p: i for i, p in enumerate(parameters)}
    check_batched(causal, layers, place)
    bases, forward = estimator.bases(own, step), body.forward

    def side(k: int, p: Tensor) -> None:
        i, (query, sign) = place[p], sides[k]
        Z = estimator.direction(i, own[i], bases[i], step, query)
        torch.add(own[i], Z, alpha=sign * estimator.epsilon, out=p.data)

    def once(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            size = next(len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1)
            repeat = partial(repeated, size, len(sides))
            with ExitStack() as patches:
                for layer in layers:
                    own_forward = partial(at_all_sides, layer, own_parameters(layer, place), side, len(sides))
                    patches.enter_context(patched(layer, own_forward))
                output = forward(*map(repeat, args), **{k: repeat(v) for k, v in kwargs.items()})
            outputs.extend((type(output), output.last_hidden_state.chunk(len(sides))))
        kind, parts = outputs
        return kind(last_hidden_state=parts[next(calls)])

    with patched(body, once):
        yield


@contextmanager
def patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the `forward` of `module` in this block."""
    before = vars(module).get("forward")  # of a hook
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def at_all_sides(
    layer: InlayLinear, parameters: list[Tensor], side: Callable[[int, Tensor], None], count: int,
    x: Tensor, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Return a layer's output for an x (count · batch, ..., in), each part at its side's θ, which `side` writes."""
    names = [] if layer.disable_adapters else [n for n in layer.active_adapters if n not in layer.merged_adapters]
    base, parts = layer._under([], args, kwargs), []

    def part(k: int) -> Tensor:
        parts.extend([] if parts else base(x).chunk(count))
        return parts[k]

    layer.called, outs = True, []
    for k, own in enumerate(x.chunk(count)):
        for p in parameters:
            side(k, p)
        outs.append(layer._under(names, args, kwargs, Known(base, own, partial(part, k)))(own))
    y = torch.cat(outs)
    return y if layer.noise is None or not layer.training else y + ops.weight_noise(x, *layer.noise)


def own_parameters(layer: InlayLinear, place: dict[Tensor, int]) -> list[Tensor]:
    """Return the trained parameters that `layer` reads, those that another layer holds included."""
    held = [layer._holder(k, name)._held(PREFIX + k)[name] for name, cut in layer.cuts.items() for k in cut.symbols]
    return [weight for slot in held if (weight := cast(Tensor, slot.weight)) in place]


def repeated(size: int, count: int, value: Any) -> Any:
    """Return a tensor of `size` examples `count` times one after another, and any other value as it is."""
    alike = isinstance(value, Tensor) and value.dim() > 1 and len(value) == size
    return value.repeat(count, *[1] * (value.dim() - 1)) if alike else value


def check_batched(causal: Any, layers: list[InlayLinear], place: dict[Tensor, int]) -> None:
    """Raise a ValueError unless all that is trained is in these layers, and two passes of the model are alike."""
    inside = {p for layer in layers for p in own_parameters(layer, place)}
    if len(inside) < len(place):
        raise ValueError(
            "batched: queries in one pass take adapters of Inlay's on the layers of a causal language model, and this "
            "one also trains something else (its head, biases, tokens, another library's adapter); leave batched out"
        )
    if any(isinstance(layer, InlayExperts) for layer in layers):
        raise ValueError("batched: queries in one pass do not reach experts; leave batched out")
    drops = [m.p for m in causal.modules() if isinstance(m, nn.Dropout)]
    drops += [cut.method.dropout for layer in layers for cut in layer.cuts.values()]
    if any(drops) or getattr(causal.config, "attention_dropout", 0.0):
        raise ValueError("batched: in one pass each side would drop something else; set dropout to 0, or leave it out")
