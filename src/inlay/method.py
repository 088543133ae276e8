"""Define the contract of a method that re-cuts a pretrained weight.

A method is a differentiable map θ ↦ ΔW(θ) from a few small tensors to an update of one frozen weight W (out × in), and
a start θ₀ computed from W. The adapted layer computes

    y = W x + s (ΔW(θ) − ΔW(θ₀)) x

and never touches W. What papers call a residual weight, W − s ΔW(θ₀), is this formula with the brackets moved. Because
W stays whole, the model starts exactly at the pretrained one in every dtype (unless its method `departs`, as two
papers mean to), nothing is decomposed when an adapter is loaded (θ₀ is stored with θ), and any number of adapters can
share one base.

A paper is one file in `inlay/methods`: a frozen dataclass whose fields are its hyperparameters, `start` (θ₀), `delta`
or, where ΔW = B A, `factors` (the equation), and `apply` only where it is better than the default. Nothing here or
there knows of PEFT.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.numerics import ops

Params = dict[str, Tensor]  # θ of one weight, keyed by the paper's symbols
Drop = ops.Dropout  # of this step
keep = ops.keep  # no dropout


class Base(Protocol):
    """Define the layer under the change: call it for its output.

    `weight` is its current (out × in) weight, dequantised, and `bias` its bias (out), if it has one. A plain frozen
    nn.Linear may have an attribute `linear`, its (weight, bias), so that `ops` can join products.
    """

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    def __call__(self, x: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Describe where in its model a weight is, among those of one adapter, and how far the training is.

    By default the weight is alone.

    Attributes:
        layer, layers: the index of its layer, and how many layers there are.
        module, modules: the index of its kind (q_proj, k_proj, ...) in its group, and how many kinds the group has.
        heads, most: into how many heads its outputs are divided, and the most of any weight of the group. Weights of
            attention are one group; others, of one head each, are one for each shape.
        writes: whether the heads are of its inputs instead: it writes to the residual stream, as o_proj does.
        t: the fraction of all optimiser steps that is done.
    """

    layer: int = 0
    layers: int = 1
    module: int = 0
    modules: int = 1
    heads: int = 1
    most: int = 1
    writes: bool = False
    t: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Define one paper's method: fields are hyperparameters, everything else is the paper's equation.

    Attributes:
        name: in recipes and adapters.
        title: one line for people.
        equation: ΔW in plain text.
        paper: authors, year, arXiv id.
        trains: the trained tensors and their shapes, in words.
        size: the hyperparameter that says how much is trained, such as the rank; None where there is none.
        frozen: symbols of θ that are kept but never trained.
        shared: symbols of θ that a group of weights has in common (see `Place`): started and stored once, with its
            first weight. Only their shapes may depend on the place.
        place: where the weight is; for `start` on a meta tensor, which is called before that is known, a lone weight.
        strength: what multiplies the change at inference (`at_strength`); 1 in training and for `start`.
        zero_init: whether ΔW(θ₀) = 0 for every W, so that θ₀ need not be stored; a property where it depends on a
            hyperparameter.
        departs: whether the start is meant to change the model (a first step, a truncation): ΔW(θ₀) then stays in the
            formula above, and θ₀ need not be stored.
        reads_weight: whether ΔW depends on W, so that θ alone does not determine it.
        linear: whether the change is a matrix ΔW. Where it depends on x in another way (routed experts, say), the
            method writes `change` in place of `delta`, and cannot be merged, exported or folded.
        scales: whether s may differ from 1; what is to stay orthogonal has to refuse it.
        roles: the part each trained symbol plays, for steps that treat them apart (LoRA+): it reads the layer's input
            ("in"), writes its output ("out"), or is a "magnitude"; any other symbol is a "core" between.
        needs: what a data-driven `start` must have seen first (None: the weight alone); `observe` sees it. A property
            where it depends on a hyperparameter.
        learning_rate: what a recipe's `learning_rate: auto` takes for a method outside of the package; None: a careful
            one. The rates of Inlay's own methods are measured (`recipe/rates.py`).
        scale: s, see the equation above.
        dropout: on the change only, never on W x.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    equation: ClassVar[str]
    paper: ClassVar[str]
    trains: ClassVar[str]
    size: ClassVar[str | None] = None
    frozen: ClassVar[frozenset[str]] = frozenset()
    shared: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[Place] = Place()
    strength: ClassVar[float] = 1.0
    zero_init: ClassVar[bool] = False
    departs: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    scales: ClassVar[bool] = True
    roles: ClassVar[dict[str, str]] = {}
    needs: ClassVar[Literal["activations", "gradients"] | None] = None
    learning_rate: ClassVar[float | None] = None

    scale: float | None = field(default=None, metadata={"help": "s in y = Wx + s (ΔW(θ) − ΔW(θ₀)) x (default 1)"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the change only, never on W x"})

    def __post_init__(self) -> None:
        for f in fields(self):
            check_value(self.name, f.name, str(f.type), f.metadata, vars(self)[f.name])
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"{self.name}: dropout={self.dropout} is not in [0, 1)")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"{self.name}: scale={self.scale} is not above 0")
        if not self.scales and self.scale not in (None, 1):
            raise ValueError(f"{self.name}: scale={self.scale} would undo its equation; leave scale out")

    @property
    def s(self) -> float:
        """Return the factor s on the change: the method's own, times the strength at which the adapter is used."""
        return self.factor * self.strength

    @property
    def factor(self) -> float:
        """Return the factor on the change that belongs to the method, with which its start is computed."""
        return self.scale or 1.0

    @property
    def draws(self) -> bool:
        """Return whether `start` draws from torch's global generator, as it may for some values of a hyperparameter.

        Such values are listed under "draws" in the field's metadata.
        """
        return any(vars(self)[f.name] in f.metadata.get("draws", ()) for f in fields(self))

    @property
    def stores_no_start(self) -> bool:
        """Return whether θ₀ is not stored, because nothing is taken off ΔW(θ): θ₀ is zero, or meant to change W."""
        return self.zero_init or self.departs

    @property
    def shifts(self) -> bool:
        """Return whether the method trains a change of the bias too."""
        return type(self).shift is not Method.shift

    @property
    def penalises(self) -> bool:
        """Return whether the method has a penalty on θ."""
        return type(self).penalty is not Method.penalty

    def role(self, symbol: str) -> str:
        """Return the part that a symbol of θ plays; a block of one, B_1, plays that of B."""
        return self.roles.get(symbol.partition("_")[0], "core")

    def at(self, place: Place) -> Self:
        """Return the same method for the weight at a place."""
        placed = copy.copy(self)
        object.__setattr__(placed, "place", place)
        return placed

    def at_strength(self, strength: float) -> Self:
        """Return the same method with its change multiplied by `strength`."""
        if strength == self.strength:
            return self
        other = copy.copy(self)
        object.__setattr__(other, "strength", strength)
        return other

    @abstractmethod
    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        """Return θ₀ for a weight W (out × in), in fp32 on W's device; on a meta tensor, the shapes alone.

        Args:
            W: the weight, which stays unchanged.
            stats: from `observe`, if `needs` is set.

        Raises:
            ValueError: a hyperparameter does not fit W's shape.
        """

    def statistic(self, seen: Tensor) -> Params:
        """Return what of one batch is averaged over the batches, if `needs` is set: by default, all of it.

        Args:
            seen: with `needs` "activations", the layer's inputs (tokens × in), padding left out; with "gradients",
                the gradient of the batch's mean loss in W, (out × in). fp32, on the layer's device, gone afterwards.
        """
        return {"mean": seen}

    def observe(self, stats: Params, seen: Tensor) -> Params:
        """Return the statistics with one more batch, from {} before the first; `start` gets them in the end.

        By default they are the running mean of `statistic`. A method that reduces otherwise overrides this.
        """
        new = {k: v.clone() for k, v in self.statistic(seen).items()}
        if not stats:
            return {**new, "batches": torch.ones(())}
        n = stats["batches"] + 1
        return {**{k: stats[k] + (v - stats[k]) / n.item() for k, v in new.items()}, "batches": n}

    def settled(self, stats: Params) -> bool:
        """Return whether another batch would change nothing that matters; a layer then looks at no more."""
        return False

    def weigh(self, E: Tensor, stats: Params | None) -> Tensor:
        """Return an error E of W (out × in), weighted as a fold is to keep it small: by default, as it is."""
        return E

    def delta(self, p: Params, W: Tensor) -> Tensor:
        """Return ΔW(θ), (out × in), without s: the definition of the update, which merge, export and the tests use.

        Raises:
            ValueError: the change is not `linear`.
        """
        if self.linear:
            raise NotImplementedError(f"{self.name} has neither `delta` nor `factors`")
        raise ValueError(
            f"{self.name}: its change depends on the input, so there is no ΔW to merge, export or fold; use the "
            "adapter as it is"
        )

    def change(self, p: Params, x: Tensor, base: Base) -> Tensor:
        """Return what θ adds to the output for x (..., in), without s, where the method is not `linear`."""
        return F.linear(x, self.delta(p, base.weight).to(x.dtype))

    def shift(self, p: Params) -> Tensor:
        """Return what θ adds to the bias, (out), without s; 0 at the start. The host adds it to what `apply` returns.

        Only where the method `shifts`, that is, has this: then its adapters merge into layers with a bias, and have no
        form as a LoRA.
        """
        raise NotImplementedError(f"{self.name} does not shift the bias")

    def penalty(self, p: Params) -> Tensor:
        """Return what the training keeps small beside the loss, a scalar of θ in fp32, weighted.

        Only where the method `penalises`, that is, has this: the trainer then adds the mean over the adapted weights
        to the loss, once per optimiser step.
        """
        raise NotImplementedError(f"{self.name} has no penalty")

    def apply(self, p: Params, p0: Params | None, x: Tensor, base: Base, drop: Drop = keep) -> Tensor:
        """Return the adapted layer's output for x (..., in). Several adapters nest: each is the `base` of the next.

        Args:
            p: θ.
            p0: θ₀, or None where ΔW(θ₀) = 0.
            x: the input.
            base: the layer below, which gives W x.
            drop: dropout for what the change reads.
        """
        p = self.level(p)
        if not self.linear:
            y, z = base(x), drop(x)
            change = self.change(p, z, base)
            return y + (self.s * (change if p0 is None else change - self.change(like(p0, p), z, base))).to(y.dtype)
        if self.reads_weight and base.weight.requires_grad:  # the base holds a trained change, on which ΔW depends too
            return base(x) + F.linear(drop(x), (self.s * self.offset(p, p0, base.weight)).to(x.dtype))
        linear = None if drop.p else ops.plain_linear(base, x)
        change = ops.dense(drop(x), linear, self.rows(p, p0, base), *p.values())
        return base(x) + change if linear is None else change

    def level(self, p: Params) -> Params:
        """Return θ with what is frozen in the dtype of what is trained, which a trainer may cast alone."""
        dtype = next(v.dtype for k, v in p.items() if k not in self.frozen)
        return {k: v.to(dtype) if k in self.frozen and v.is_floating_point() else v for k, v in p.items()}

    def rows(self, p: Params, p0: Params | None, base: Base) -> ops.Rows:
        """Return s (ΔW(θ) − ΔW(θ₀)) for `ops.dense`, built from p's values: whole by default, else by rows."""

        def build(*values: Tensor) -> tuple[Tensor]:
            W = base.weight
            D = self.offset(dict(zip(p, values, strict=True)), p0, W)
            if D.shape != W.shape:
                raise ValueError(
                    f"{self.name}: ΔW is {tuple(D.shape)}, and W is {tuple(W.shape)}; choose hyperparameters that fit "
                    "this weight, or exclude its module"
                )
            return (self.s * D,)

        return ops.Rows(build)

    def restart(self, p: Params, t: float) -> dict[str, Tensor | None]:
        """Restart, in place, what is due at t; return by symbol a mask of the entries that are new, or None for all.

        The host calls it after every step, before `schedule`, and again with the same t where a run is resumed, so θ
        has to tell what was done already. The optimiser forgets what it knew of those entries.
        """
        return {}

    def schedule(self, p: Params, t: float) -> frozenset[str]:
        """Return the symbols that stay fixed until a later call leaves them out; t is the fraction of steps done.

        The host calls it after every step.
        """
        return frozenset()

    def offset(self, p: Params, p0: Params | None, W: Tensor) -> Tensor:
        """Return ΔW(θ) − ΔW(θ₀), (out × in): exactly zero at the start."""
        D = self.delta(p, W)
        return D if p0 is None else D - self.delta(like(p0, p), W)


@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Define a method with ΔW = B A, B and A thin: it writes `factors`, and its export to LoRA is exact."""

    size = "r"
    roles = {"A": "in", "B": "out"}

    r: int = field(default=8, metadata={"help": "rank", "min": 1})

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, A) of ΔW = B A; unless the method `reads_weight`, W may have only the true width."""
        return p["B"], p["A"]

    def delta(self, p: Params, W: Tensor) -> Tensor:
        B, A = self.factors(p, W)
        return B @ A

    def pair(self, p: Params, p0: Params | None, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return ΔW(θ) − ΔW(θ₀) = (B − B₀) A + B₀ (A − A₀) as one product of (out × 2r) and (2r × in).

        It is zero at the start in any order of products, and nothing large cancels.
        """
        B, A = self.factors(p, W)
        if p0 is None:
            return B, A
        B0, A0 = self.factors(like(p0, p), W)
        return torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0])

    def offset(self, p: Params, p0: Params | None, W: Tensor) -> Tensor:
        B, A = self.pair(p, p0, W)
        return B @ A

    def written(self, p: Params, p0: Params | None) -> tuple[ops.Factors, Sequence[Tensor]] | None:
        """Return a function for `pair`, with s in B and written-out gradients, and its arguments; None: use autograd.

        With written-out gradients a small layer is faster than with autograd's.
        """
        if type(self).factors is not LowRank.factors:
            return None
        return ops.Pair(self.s, None if p0 is None else (p0["A"], p0["B"])), (p["A"], p["B"])

    def apply(self, p: Params, p0: Params | None, x: Tensor, base: Base, drop: Drop = keep) -> Tensor:
        p = self.level(p)
        if self.reads_weight and base.weight.requires_grad:  # the base holds a trained change, on which ΔW depends too
            return super().apply(p, p0, x, base, drop)
        shape = x.new_empty(0, x.shape[-1])  # `build` keeps what it refers to until the backward pass: never x

        def build(*values: Tensor) -> tuple[Tensor, Tensor | None]:
            W = base.weight if self.reads_weight else shape
            B, A = self.pair(dict(zip(p, values, strict=True)), p0, W)
            return ops.times(self.s, B), A

        factors, values = self.written(p, None if p0 is None else like(p0, p)) or (build, tuple(p.values()))
        linear = ops.plain_linear(base, x)
        change = ops.low_rank(x, linear, factors, "A" not in self.frozen, drop, *values)
        return base(x) + change if linear is None else change


@dataclass(frozen=True, kw_only=True)
class Diagonal(LowRank):
    """Define ΔW = B diag(z) A with frozen B (out × r) and A (r × in); the third symbol, a vector (r), is trained."""

    frozen = frozenset({"A", "B"})

    def factors(self, p: Params, W: Tensor) -> tuple[Tensor, Tensor]:
        return self.pair(p, None, W)

    def pair(self, p: Params, p0: Params | None, W: Tensor) -> tuple[Tensor, Tensor]:
        (z,) = p.keys() - self.frozen
        return p["B"] * (p[z] if p0 is None else p[z] - like(p0, p)[z]), p["A"]


def like(p0: Params, p: Params) -> Params:
    """Return θ₀ rounded as θ is: a trainer that casts θ to bf16 must not move the start."""
    return {k: v if v.dtype == p[k].dtype else v.to(p[k].dtype) for k, v in p0.items()}


def check_seen(method: Method, stats: Params | None) -> Params:
    """Return the statistics; raise a ValueError where a data-driven start is called without any."""
    if not stats:
        raise ValueError(
            f"{method.name} starts from {method.needs} of the data: call inlay.calibrate(model, batches) before the "
            "model's first use (inlay train does it)"
        )
    return stats


def check_rank(method: Method, r: int, W: Tensor) -> None:
    """Raise the ValueError of every low-rank start for a rank that its weight cannot have."""
    if r > min(W.shape):
        out, inp = W.shape
        raise ValueError(
            f"{method.name}: r={r} is larger than the {out} × {inp} weight allows; choose r <= {min(W.shape)}"
        )


def check_value(owner: str, key: str, kind: str, meta: Mapping[str, Any], value: Any) -> None:
    """Raise a ValueError unless `value` has the annotated type `kind` and obeys the field's metadata."""
    if value is None and "None" in kind:
        return
    if "choices" in meta:
        if value not in meta["choices"]:
            raise ValueError(f"{owner}: {key}={value!r} is not one of {', '.join(meta['choices'])}")
    elif kind.startswith("int") and type(value) is not int:
        raise ValueError(f"{owner}: {key}={value!r} is not a whole number")
    elif kind.startswith("float") and (type(value) not in (int, float) or not math.isfinite(cast(float, value))):
        raise ValueError(f"{owner}: {key}={value!r} is not a finite number")
    if "above" in meta and value <= meta["above"]:
        raise ValueError(f"{owner}: {key}={value} is not above {meta['above']}")
    if "max" in meta and value > meta["max"]:
        raise ValueError(f"{owner}: {key}={value} is above {meta['max']}")
    if "min" in meta and value < meta["min"]:
        raise ValueError(f"{owner}: {key}={value} is below {meta['min']}")
