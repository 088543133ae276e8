"""Stand-ins for the weights of experts, with which a model's own code for experts computes adapted products.

transformers has several implementations of experts (eager, batched, grouped), and models have their own. All of them
come down to a few products of rows with the weights of the experts they are routed to. A stand-in passes for the weight
until such a product is made, which is then an adapted layer's; whatever else would read its numbers is refused, or an
adapter would have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.numerics.ops.shared import own_precision

TURNS = ("transpose", "t", "T", "mT")
PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback")


@dataclass(frozen=True)
class Routed:
    """Say which experts multiply which rows, and how the model's own code does.

    Attributes:
        experts: the experts that have rows.
        sizes: how many rows each of them has; rows are in the order of `experts`.
        one: the product of some rows (n, in) with the weight of one expert, as the model computes it.
        whole: the product of all rows at once, where that is more than `one` of each part.
        joins: whether `one` is to the bit what F.linear gives, so that a change may be added into its product.
    """

    experts: Sequence[int]
    sizes: Sequence[int]
    one: Callable[[int, Tensor], Tensor]
    whole: Callable[[], Tensor] | None = None
    joins: bool = True


Product = Callable[[Tensor, Routed], Tensor]
Function = Callable[..., Tensor]


class StandIn(Tensor):
    """Pass for the weight (E, out, in) of experts, or for a part of it.

    `plain` is what it stands for, `product` computes with it, `tall` says whether its last two sides are (out, in), and
    `which` the experts it holds: all (None), one, or one for each row.
    """

    plain: Tensor
    product: Product
    tall: bool
    which: int | Tensor | None

    @staticmethod
    def of(plain: Tensor, product: Product, tall: bool, which: int | Tensor | None = None) -> StandIn:
        """Return a stand-in for `plain`."""
        new = plain.as_subclass(StandIn)
        new.plain = plain
        new.product = product
        new.tall = tall
        new.which = which
        return new

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, function: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        # A property of tensors comes as the `__get__` of its descriptor.
        name = function.__self__.__name__ if function.__name__ == "__get__" else function.__name__
        if name == "__getitem__":
            return picked(*args)
        if name in TURNS:
            stand, *dims = args
            if name != "transpose" or {d % stand.plain.ndim for d in dims} == {
                stand.plain.ndim - 2,
                stand.plain.ndim - 1,
            }:
                return StandIn.of(stand.plain.transpose(-2, -1), stand.product, not stand.tall, stand.which)
        if name in PRODUCTS:
            return multiplied(name, function, *args, **kwargs)
        result = function(*map(reveal, args), **{k: reveal(v) for k, v in kwargs.items()})
        if isinstance(result, Tensor):
            raise ValueError(
                f"the experts of this model read their weights through {name}, which Inlay does not know how to adapt; "
                "leave experts out"
            )
        return result


def reveal(value: object) -> object:
    """Return what a stand-in stands for, and any other value as it is."""
    return value.plain if isinstance(value, StandIn) else value


def picked(stand: StandIn, index: object) -> StandIn:
    """Return the stand-in for one expert, or for one for each row."""
    if stand.which is not None or not isinstance(index, int | Tensor) or (isinstance(index, Tensor) and index.ndim > 1):
        raise ValueError(
            f"the experts of this model take parts of their weights ({index!r}) that Inlay does not know how to adapt; "
            "leave experts out"
        )
    if isinstance(index, Tensor) and index.ndim:  # of which no copy is made for each row
        rows = stand.plain[:1].expand(len(index), -1, -1)
        new = StandIn.of(rows, stand.product, stand.tall, index)
        new.plain = stand.plain
        return new
    return StandIn.of(stand.plain[index], stand.product, stand.tall, int(index))


def multiplied(
    name: str, function: Function, first: Tensor, second: Tensor, *more: Tensor | None, **kwargs: Tensor | None
) -> Tensor:
    """Return the product of a tensor and a stand-in, whichever comes first, as the adapted layer gives it."""
    stand, x = (first, second) if isinstance(first, StandIn) else (cast(StandIn, second), first)
    plain, which = stand.plain, stand.which
    if "grouped" in name:
        return grouped(function, x, stand, cast(Tensor, kwargs.pop("offs")), **kwargs)
    if name == "linear":
        bias = more[0] if more else kwargs.get("bias")
        y = by_one(x, stand, lambda e, rows: F.linear(rows, plain))
        return y if bias is None else y + bias
    if which is None:  # (E, n, in), the same number of rows for each expert
        (E, n), parts = x.shape[:2], range(len(plain))
        routed = Routed(parts, [n] * E, lambda e, rows: function(rows[None], plain[e : e + 1])[0])
        return stand.product(x.flatten(0, 1), routed).unflatten(0, (E, n))
    if isinstance(which, int):
        return by_one(x, stand, lambda e, rows: function(rows, plain))
    return by_row(function, x, stand, stand is first)


def by_one(x: Tensor, stand: StandIn, one: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return the product of x (..., in) with the weight of one expert."""
    flat = x.reshape(-1, x.shape[-1])
    return stand.product(flat, Routed([int(stand.which or 0)], [len(flat)], one)).view(*x.shape[:-1], -1)


def by_row(function: Function, x: Tensor, stand: StandIn, first: bool) -> Tensor:
    """Return the products of rows with an expert each; x is (S, 1, in), or (S, in, 1) where weights come `first`."""
    ids, plain = stand.which, stand.plain
    assert isinstance(ids, Tensor)
    order = ids.argsort(stable=True)
    ends = evenly(len(ids), len(plain)) if ids.is_meta else ids.bincount(minlength=len(plain)).cumsum(0).tolist()
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    dim = -1 if first else 1

    def one(e: int, rows: Tensor) -> Tensor:
        each, rows = plain[e].expand(len(rows), -1, -1), rows.unsqueeze(dim)
        return (function(each, rows) if first else function(rows, each)).squeeze(dim)

    experts = [e for e, count in enumerate(counts) if count]
    routed = Routed(experts, [counts[e] for e in experts], one, joins=False)
    y = stand.product(x.squeeze(dim)[order], routed)
    return torch.empty_like(y).index_copy(0, order, y).unsqueeze(dim)


def evenly(rows: int, experts: int) -> list[int]:
    """Return where the rows of each expert end if all have the same number: on the meta device nobody knows."""
    return [rows * (e + 1) // experts for e in range(experts)]


def grouped(function: Function, x: Tensor, stand: StandIn, offs: Tensor, **kwargs: Tensor | None) -> Tensor:
    """Return the product of rows x (S, in), sorted by their experts, each with its own; `offs` says where they end."""
    plain = stand.plain
    ends = evenly(len(x), len(plain)) if offs.is_meta else offs.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    experts = [e for e, size in enumerate(sizes) if size]
    rest = len(x) - ends[-1]  # rows of experts that another process has

    def one(e: int, rows: Tensor) -> Tensor:
        if joins:
            with own_precision(rows.device.type):  # autocast does not reach grouped products
                return rows @ plain[e]
        return function(rows, plain[e : e + 1], offs=offs.new_tensor([len(rows)]), **kwargs)

    def whole() -> Tensor:
        return function(x, plain, offs=offs, **kwargs)[: ends[-1]]

    joins = x.device.type in ("cpu", "meta")  # where torch multiplies one expert after the other
    routed = Routed(experts, [sizes[e] for e in experts], one, None if joins else whole, joins)
    y = stand.product(x[: ends[-1]].to(plain.dtype), routed)
    return F.pad(y, (0, 0, 0, rest)) if rest else y
