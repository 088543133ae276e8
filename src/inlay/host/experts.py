"""The fused experts of mixture-of-experts models: each parameter is a layer to adapt, and each expert a weight of it.

transformers keeps the weights of a layer's experts in two parameters, `gate_up_proj` (E, 2 f, d) and `down_proj`
(E, d, f). θ of such a group is the method's θ with a leading E: every expert has a start of its own, and its change is
computed for the rows that are routed to it, by the method, which sees a layer like any other. So for the backward pass
a method keeps what it keeps of a layer, of these rows alone. The model's own code for experts runs as it is, whichever
implementation was chosen, on stand-ins for the parameters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from inlay.host import distributed
from inlay.host.compute_starts import Job
from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX, Adapted, InlayLinear, bounded_shapes, change_of
from inlay.host.module_names import layer_index
from inlay.host.stand_in import Routed, StandIn
from inlay.method import Base, Drop, Method, Params
from inlay.numerics import ops

Theta = dict[int, tuple[Method, Params, Params | None]]  # of each expert that an adapter is on
Thetas = dict[str, Theta]  # by adapter

EXPERTS_STAY = (
    "the experts of this model stay frozen, and its routers: they are no linear layers; experts=True takes the experts "
    "in (experts: true in a recipe, --experts)"
)
TRANSPOSED = {"Llama4TextExperts": True}  # whether a class outside transformers' interface for experts keeps (in, out)


class ExpertWeight(nn.Module):
    """Present one parameter of an experts module, which keeps it, as a base layer."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self.kept = (experts, name)  # in a tuple, so that the parameter stands in the model once
        self.tall = not is_transposed(experts)
        self.in_interface = is_in_interface(experts)  # so PEFT knows how it lies
        self.count, *sides = self.weight.shape
        self.out_features, self.in_features = sides if self.tall else reversed(sides)

    @property
    def weight(self) -> Tensor:
        experts, name = self.kept
        return experts.get_parameter(name)

    def has_watchers(self) -> bool:
        """Return whether this is within `watched`."""
        return next(self.children(), None) is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Let each expert be a module "0", "1", ... in this block, which is called with its rows and their outputs."""
        names = [str(e) for e in range(self.count)]
        for name in names:
            self.add_module(name, Seen())
        try:
            yield
        finally:
            for name in names:
                delattr(self, name)

    def matrices(self, W: Tensor) -> Tensor:
        """Return W, which lies as the parameter does, as (E, out, in), or the other way round."""
        return W if self.tall else W.mT


class Seen(nn.Module):
    """Return outputs as they are; hooks on this module see them, and the rows they are of."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class Expert:
    """Present one expert to the methods, as a layer that holds its part of θ."""

    def __init__(self, group: InlayExperts, theta: Thetas, e: int) -> None:
        self.group = group
        self.parts = theta
        self.e = e

    def theta(self, name: str) -> tuple[Method, Params, Params | None]:
        return self.parts[name][self.e]

    def drop(self, name: str) -> Drop:
        return self.group.drop(name)

    def change(self, name: str, W: Tensor) -> Tensor:
        return change_of(*self.theta(name), W)


class RoutedRows:
    """Present an expert without adapters to a method, with the rows x (n, in) that are routed to it.

    `known` gives its output for them, where all experts are computed at once.
    """

    bias = None

    def __init__(self, W: Tensor, e: int, x: Tensor, routed: Routed, known: Callable[[], Tensor] | None) -> None:
        self.weight = W
        self.e = e
        self.x = x
        self.routed = routed
        self.known = known

    @property
    def linear(self) -> ops.Linear | None:
        """Return the weight, and no bias, if the model's product with it is a plain one."""
        return (self.weight, None) if self.routed.joins and not self.weight.requires_grad else None

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.known() if x is self.x and self.known is not None else self.routed.one(self.e, x)


class Shares:
    """Say what of an adapter's tensors belongs to which expert: they are stacked, or, if methods differ, end to end.

    Args:
        methods: of each expert; None: it has no adapter.
        out, inp: the sides of an expert's weight.

    Raises:
        ValueError: the methods have not the same symbols, or one does not fit the weight.
    """

    def __init__(self, methods: Sequence[Method | None], out: int, inp: int) -> None:
        known: dict[str, Params] = {}
        self.methods = {e: method for e, method in enumerate(methods) if method is not None}
        for method in self.methods.values():
            if repr(method) not in known:
                known[repr(method)] = bounded_shapes(method, out, inp)
        self.shapes = {e: known[repr(method)] for e, method in self.methods.items()}
        self.stacked = len(known) == 1
        if len({tuple(shapes) for shapes in known.values()}) > 1:
            raise ValueError(
                "the experts of one layer differ in more than the sizes of their tensors; give them one value"
            )

    def whole(self) -> Params:
        """Return the adapter's tensors, on the meta device."""
        first = next(iter(self.shapes.values()))
        if self.stacked:
            return {k: v.expand(len(self.shapes), *v.shape) for k, v in first.items()}
        ends = {k: sum(shapes[k].numel() for shapes in self.shapes.values()) for k in first}
        return {k: v.new_empty(ends[k]) for k, v in first.items()}

    def split(self, k: str, tensor: Tensor) -> dict[int, Tensor]:
        """Return what of the tensor of the symbol `k` is of each expert; the gradients of all are joined once."""
        if self.stacked:
            return dict(zip(self.shapes, tensor.unbind(), strict=True))
        parts = tensor.split([shapes[k].numel() for shapes in self.shapes.values()])
        return {e: part.view(shapes[k].shape) for (e, shapes), part in zip(self.shapes.items(), parts, strict=True)}

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return one tensor of those of all experts."""
        return torch.stack(list(parts)) if self.stacked else torch.cat([part.flatten() for part in parts])


class InlayExperts(InlayLinear):
    """Adapt one weight of all experts of a layer: each is computed as an `InlayLinear` is, on its own rows."""

    base_layer: ExpertWeight
    other_param_names = (*InlayLinear.other_param_names, "shares")

    def __init__(self, base_layer: ExpertWeight) -> None:
        super().__init__(base_layer)
        self.shares: dict[str, Shares] = {}

    def share(self, name: str, methods: Sequence[Method | None]) -> None:
        """Say which method each expert has in the adapter `name`, before `update_layer`; None: none."""
        self.shares[name] = Shares(methods, self.out_features, self.in_features)

    def sides(self, base_layer: nn.Module) -> tuple[int, int]:
        assert isinstance(base_layer, ExpertWeight)
        return base_layer.in_features, base_layer.out_features

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base_layer.count, self.out_features, self.in_features

    def matrix(self) -> Tensor:
        return self.base_layer.matrices(self.base_layer.weight)

    def pristine(self) -> Tensor:
        return self.matrix() if self.unmerged is None else self.base_layer.matrices(self.unmerged)

    def shapes_of(self, name: str, method: Method) -> Params:
        return self.shares[name].whole()

    def check_plain_weight(self) -> None:
        """Accept every weight: one of experts is a parameter."""

    def set_base_weight(self, weight_data: Tensor) -> None:
        self.base_layer.weight.data = self.base_layer.matrices(weight_data).contiguous()

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.base_layer.matrices(self.change(adapter, self.pristine()))

    def experts(self, name: str) -> dict[int, Expert]:
        """Return each expert that the adapter `name` is on as the methods see it, by its number."""
        parts = {name: self.parts(name)}
        return {e: Expert(self, parts, e) for e in parts[name]}

    def parts(self, name: str) -> Theta:
        """Return method, θ and θ₀ of each expert that the adapter `name` is on."""
        shares, (method, p, p0) = self.shares[name], self.theta(name)
        each = {k: shares.split(k, v) for k, v in p.items()}
        first = {} if p0 is None else {k: each[k] if p0[k] is p[k] else shares.split(k, p0[k]) for k in p0}
        return {
            e: (
                own.at(method.place).at_strength(method.strength),
                {k: v[e] for k, v in each.items()},
                None if p0 is None else {k: v[e] for k, v in first.items()},
            )
            for e, own in shares.methods.items()
        }

    def parts_of(self, name: str) -> list[tuple[Method, Params]]:
        return [(method, p) for method, p, _ in self.parts(name).values()]

    def change(self, name: str, W: Tensor) -> Tensor:
        """Return s (ΔW(θ) − ΔW(θ₀)) of one adapter over the weights W, (E, out, in), in fp32 or better."""
        parts = self.parts(name)
        each = (change_of(*parts[e], own) if e in parts else torch.zeros_like(own).float() for e, own in enumerate(W))
        return torch.stack(list(each))

    def row_norms(self) -> Tensor:
        raise ValueError("noise on the weights (Flat-LoRA) does not reach experts; leave it out, or experts")

    # -- products -------------------------------------------------------------------------------------------------

    def stand_in(self) -> StandIn | None:
        """Return what is to stand for the parameter in a forward pass; None where the base computes alone."""
        self.called = True
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = () if self.disable_adapters else self.active_adapters
        names = [n for n in active if n in self.cuts and n not in self.merged_adapters and self.scaling[n] != 0]
        if not names and not self.base_layer.has_watchers():
            return None
        weight = self.base_layer.weight
        parts = {name: self.parts(name) for name in names}
        product = partial(self.product, self.base_layer.matrices(weight), parts)
        return StandIn.of(weight, product, self.base_layer.tall)

    def product(self, W: Tensor, parts: Thetas, x: Tensor, routed: Routed) -> Tensor:
        """Return the output (n, out) for rows x (n, in) with adapters on W, each over the ones before."""
        split, whole = x.split(list(routed.sizes)), Once(routed)
        outputs = []
        for i, (e, rows) in enumerate(zip(routed.experts, split, strict=True)):
            known = None if routed.whole is None else partial(whole.part, i)
            layer: Base = RoutedRows(W[e], e, rows, routed, known)
            for name in (n for n in parts if e in parts[n]):
                layer = Adapted(Expert(self, parts, e), name, layer)
            y = layer(rows)
            outputs.append(self.base_layer.get_submodule(str(e))(rows, y) if self.base_layer.has_watchers() else y)
        return torch.cat(outputs) if outputs else x.new_zeros(0, self.out_features)

    # -- starts and steps -----------------------------------------------------------------------------------------

    @property
    def seen(self) -> list[str]:
        return [f"base_layer.{e}" for e in range(self.base_layer.count)]

    def _jobs(self, name: str, like: str | None, stats: list[Params] | None) -> Iterator[Job]:
        cut, shares = self.cuts[name], self.shares[name]
        starts: list[Params] = []

        def done(start: Params) -> None:
            starts.append(start)
            if len(starts) == len(shares.methods):
                self._settle_start(name, like, {k: shares.join([s[k] for s in starts]) for k in start})

        for e, method in shares.methods.items():
            yield Job(
                method,
                (self.out_features, self.in_features),
                partial(self._read, e),
                done,
                None if stats is None else stats[e],
                None if cut.seed is None else ops.seed_of(cut.seed, cut.module, e),
            )

    def _read(self, e: int) -> Tensor:
        return self.pristine()[e].detach().float().contiguous()

    def _restart(self, name: str, method: Method, p: Params, t: float) -> dict[str, Tensor | None]:
        shares, seen = self.shares[name], distributed.Gathered(p)
        each = {k: shares.split(k, seen[k]) for k in p}
        begun = {e: own.restart({k: v[e] for k, v in each.items()}, t) for e, own in shares.methods.items()}
        seen.scatter()
        masks: dict[str, Tensor | None] = {}
        for k in {k for new in begun.values() for k in new}:
            own = {e: new.get(k, False) for e, new in begun.items()}
            everything = all(mask is None for mask in own.values())
            masks[k] = None if everything else shares.join([mask_of(m, each[k][e]) for e, m in own.items()])
        return masks

    def _merged(self, old: Tensor, names: list[str]) -> Tensor:
        """Return the weights with these adapters in them, of which only one at a time is held in fp32."""
        parts, new = [self.parts(name) for name in names], torch.empty_like(old)
        for e, W in enumerate(old):
            W = W.to(torch.promote_types(old.dtype, torch.float32))
            for part in (part for part in parts if e in part):
                W = W + change_of(*part[e], W).to(W.dtype)
            self.check_range(W, old.dtype)
            new[e] = W
        return new


class Once:
    """Compute the product of all rows at once, when the first part of it is asked for."""

    def __init__(self, routed: Routed) -> None:
        self.routed = routed
        self.made: tuple[Tensor, ...] = ()

    def part(self, i: int) -> Tensor:
        """Return the rows of the i-th expert."""
        if not self.made:
            assert self.routed.whole is not None
            self.made = self.routed.whole().split(list(self.routed.sizes))
        return self.made[i]


def mask_of(mask: Tensor | bool | None, like: Tensor) -> Tensor:
    """Return the mask of what `restart` set anew in a tensor: of all of it (None) and of nothing (False), too."""
    return mask if isinstance(mask, Tensor) else torch.full_like(like, mask is None, dtype=torch.bool)


class AdaptedExperts(nn.Module):
    """Run an experts module with stand-ins for its parameters, each an `InlayExperts` under the parameter's name."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer = experts

    def layers(self) -> dict[str, InlayExperts]:
        """Return the adapted parameters by name."""
        return {name: layer for name, layer in self.named_children() if isinstance(layer, InlayExperts)}

    @torch.compiler.disable  # a compiled model runs this part as it is
    def forward(self, *args: object, **kwargs: object) -> object:
        stands = {name: layer.stand_in() for name, layer in self.layers().items()}
        stands = {name: stand for name, stand in stands.items() if stand is not None}
        if not stands:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, stands, args, kwargs)  # type: ignore[arg-type]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the experts module itself, with the adapters in its weights if `merge`; PEFT calls it."""
        if merge:
            for layer in self.layers().values():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


# -- finding them -----------------------------------------------------------------------------------------------------


def is_transposed(experts: nn.Module) -> bool | None:
    """Return whether the weights of an experts module lie as (E, in, out); None where that is unknown."""
    if is_in_interface(experts):
        return bool(experts.is_transposed)
    return TRANSPOSED.get(type(experts).__name__)


def is_in_interface(experts: nn.Module) -> bool:
    """Return whether transformers' interface for experts, which sets this attribute, runs a module."""
    return "is_transposed" in vars(experts)


def expert_weights(experts: nn.Module) -> list[str]:
    """Return the names of the parameters of a module that hold a matrix for each expert."""
    return [name for name, p in experts.named_parameters(recurse=False) if p.ndim == 3]


def count_of(experts: nn.Module) -> int:
    """Return how many experts a module holds."""
    return len(experts.get_parameter(expert_weights(experts)[0]))


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of `model`, adapted or not, that hold a layer's experts in parameters of three dimensions."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if PREFIX not in name
        if expert_weights(module) and (is_transposed(module) is not None or "experts" in name.split("."))
    }


def some_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return what `fused_experts` does.

    Raises:
        ValueError: there are none.
    """
    experts = fused_experts(model)
    if not experts:
        raise ValueError("experts: this model has no fused experts; leave experts out")
    return experts


def check_experts(name: str, experts: nn.Module, method: Method) -> None:
    """Raise a ValueError where an experts module, or a method, cannot be taken in."""
    if method.shared or not method.linear:
        why = (
            f"shares {', '.join(sorted(method.shared))} over layers" if method.shared else "is no matrix for all inputs"
        )
        raise ValueError(f"experts: {method.name} {why}, which experts cannot hold; leave experts out, or take another")
    kind = type(experts).__name__
    if is_transposed(experts) is None:
        raise ValueError(
            f"experts: {name} is a {kind}, which is outside transformers' interface for experts, and which Inlay does "
            "not know; leave experts out"
        )
    packed = [n for n in expert_weights(experts) if not experts.get_parameter(n).is_floating_point()]
    if packed:
        raise ValueError(f"experts: {packed[0]} of {name} is quantised, which Inlay cannot adapt; leave experts out")


def taken_experts(config: InlayConfig, name: str, module: nn.Module) -> set[int]:
    """Return which experts of the parameter `name` a config takes in: what it excludes, or saves whole, it does not."""
    layers = config.layers_to_transform
    if layers is not None and layer_index(name) not in ([layers] if isinstance(layers, int) else layers):
        return set()
    if is_left_out(config, name):
        return set()
    if not isinstance(config.experts, dict):
        return set(range(len(module.get_parameter(name.rpartition(".")[2]))))
    experts = name.rpartition(".")[0]
    return {e for one, own in config.experts.items() if f".{experts}".endswith(f".{one}") for e in own}


def is_left_out(config: InlayConfig, name: str) -> bool:
    """Return whether a config excludes a parameter of experts, or saves it whole."""
    places = [name, name.rpartition(".")[0]]
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        return any(re.fullmatch(excluded, place) for place in places)
    left = [*(excluded or ()), *(config.modules_to_save or ())]
    return any(place == one or place.endswith(f".{one}") for one in left for place in places)


def report_frozen_experts(model: nn.Module) -> None:
    """Warn, once for a model, that its experts and routers are no linear layers, and how experts are taken in."""
    if fused_experts(model):
        warnings.warn(EXPERTS_STAY, stacklevel=2)
