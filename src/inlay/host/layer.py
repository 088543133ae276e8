"""One adapted linear layer, for every method: it holds θ and θ₀, nests the active adapters, merges and unmerges."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper, quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import Conv1D

from inlay.host import distributed, seal
from inlay.host.bitsandbytes_guard import readable
from inlay.host.compute_starts import Job, run_jobs
from inlay.host.slot import Slot
from inlay.method import Base, Drop, LowRank, Method, Params, Place, check_seen, keep, like
from inlay.numerics import ops


def adapted(model: nn.Module, adapter_name: str) -> dict[str, InlayLinear]:
    """Return the layers that carry the adapter `adapter_name`, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, InlayLinear) and adapter_name in m.cuts}


UNSEALED = (
    "the adapter's tensors are not those it was saved with (a damaged or converted file?); "
    "set config.seals = None to load them all the same"
)
PREFIX = "inlay_"
SMALL, LARGEST = 1 << 16, 16  # a weight counts as no smaller; so many times its entries θ may hold
START = "inlay_start_"  # θ₀, stored beside θ so that nothing is ever decomposed again


@dataclass
class Cut:
    """Hold one adapter on one layer.

    `pending`: its slots are NaN until a checkpoint or a decomposition fills them; what a checkpoint fills them with
    must bear its `seal`. `folded`: s ΔW(θ₀) was taken out of the base, so there is no θ₀. `owner`: the layer that holds
    the shared symbols, where it is another one. `seed`: of what its start draws.
    """

    method: Method
    symbols: tuple[str, ...]
    start: tuple[str, ...]
    perturb: bool = False
    module: str = ""
    seal: dict[str, Any] | None = None
    folded: bool = False
    saver: str = "none"
    pending: bool = True
    owner: InlayLinear | None = None
    seed: int | None = None

    @property
    def own(self) -> tuple[str, ...]:
        """Return the symbols that this layer holds."""
        return tuple(k for k in self.symbols if self.owner is None or k not in self.method.shared)

    def is_rebuilt(self, path: str) -> bool:
        """Return whether a fresh adapter of this configuration has in a slot just what this one was trained with."""
        method = self.method
        if method.needs or (method.draws and self.seed is None):
            return False
        if path.startswith(START):
            return True
        symbol = path.removeprefix(PREFIX).partition(".")[0]
        if symbol in method.frozen:
            return type(method).restart is Method.restart
        return type(method).restart is Method.restart and type(method).schedule is Method.schedule


def widen(p: Params) -> Params:
    """Return tensors in fp32 at least, and indices as they are."""
    return {k: v.to(torch.promote_types(v.dtype, torch.float32)) if v.is_floating_point() else v for k, v in p.items()}


def change_of(method: Method, p: Params, p0: Params | None, W: Tensor) -> Tensor:
    """Return s (ΔW(θ) − ΔW(θ₀)) over the weight W, (out × in), in fp32 (or better, where θ is)."""
    p0 = None if p0 is None else widen(like(p0, p))
    return method.s * method.offset(widen(p), p0, W)


class Holder(Protocol):
    """Define what `Adapted` asks of the layer that holds θ."""

    def theta(self, name: str) -> tuple[Method, Params, Params | None]: ...

    def drop(self, name: str) -> Drop: ...

    def change(self, name: str, W: Tensor) -> Tensor: ...


def shift_of(method: Method, p: Params) -> Tensor | None:
    """Return s times what θ adds to the bias, (out), in fp32 at least; None where the method leaves it alone."""
    return method.s * method.shift(widen(p)) if method.shifts else None


def check_saver(method: Method, trained: tuple[str, ...], saver: str) -> None:
    """Raise a ValueError unless a method keeps x for the gradient of an inner factor, and reads x as it is."""
    if not isinstance(method, LowRank) or not any(method.role(k) == "in" for k in trained):
        raise ValueError(f"saver={saver}: {method.name} keeps no x for the gradient of an inner factor; leave it out")
    if method.dropout:
        raise ValueError(f"saver={saver} with dropout={method.dropout}: what is kept is of x itself; set dropout to 0")


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """Return a module's weight where it is a parameter of its own, not computed from others."""
    return dict(module.named_parameters(recurse=False)).get("weight")


def bounded_shapes(method: Method, out: int, inp: int) -> Params:
    """Return θ₀ of an (out × inp) weight on the meta device, after a look at the size that `method` asks for.

    Raises:
        ValueError: a hyperparameter is out of all proportion to the weight, or θ would be.
    """
    entries = max(out * inp, SMALL)
    for f in fields(method):
        value = getattr(method, f.name)
        if type(value) is int and value > entries and not f.name.endswith("seed"):
            raise ValueError(f"{method.name}: {f.name}={value} is more than the {out} × {inp} weight has entries")
    shapes = method.start(torch.empty(out, inp, device="meta"))
    count = sum(shape.numel() for shape in shapes.values())
    if count > LARGEST * entries:
        raise ValueError(
            f"{method.name}: θ would hold {count:,} numbers for a {out} × {inp} weight; choose smaller hyperparameters"
        )
    return shapes


def strip(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return `tensors` without the adapter's `name` in their paths, which may change between save and load."""
    return {path.replace(f".{name}.", "."): tensor for path, tensor in tensors.items()}


class Frozen:
    """Present the layer without adapters to a method."""

    def __init__(self, layer: InlayLinear, args: tuple, kwargs: dict) -> None:
        self.layer = layer
        self.args = args
        self.kwargs = kwargs

    @property
    def weight(self) -> Tensor:
        return self.layer.matrix()

    @property
    def linear(self) -> tuple[Tensor, Tensor | None] | None:
        """Return the layer's weight and bias, if calling it means nothing more than these."""
        layer = self.layer.base_layer
        own = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        hooks = own or _has_any_global_hook() or "forward" in vars(layer)  # where accelerate puts its hooks
        if type(layer) is not nn.Linear or hooks or self.args or self.kwargs or self.layer.quantization_backend:
            return None
        tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        whole = all(type(t) in (Tensor, nn.Parameter) for t in tensors) and not trained
        return (layer.weight, layer.bias) if whole else None

    @property
    def bias(self) -> Tensor | None:
        return dict(self.layer.base_layer.named_parameters(recurse=False)).get("bias")

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.layer.base_layer(x, *self.args, **self.kwargs)


class Adapted:
    """Present a layer with one more adapter on it to the next method."""

    def __init__(self, layer: Holder, name: str, base: Base) -> None:
        self.layer = layer
        self.name = name
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight + self.layer.change(self.name, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        shift, bias = shift_of(*self.layer.theta(self.name)[:2]), self.base.bias
        return bias if shift is None else shift if bias is None else bias + shift

    def __call__(self, x: Tensor, /) -> Tensor:
        method, p, p0 = self.layer.theta(self.name)
        y, shift = method.apply(p, p0, x, self.base, self.layer.drop(self.name)), shift_of(method, p)
        return y if shift is None else y + shift.to(y.dtype)


class InlayLinear(nn.Module, BaseTunerLayer):
    """Compute y = W x + Σ s (ΔW(θ) − ΔW(θ₀)) x over the active adapters, each on the sum of those before."""

    other_param_names = ("cuts", "scaling")

    def __init__(self, base_layer: nn.Module, home: torch.device | None = None, get_apply_tensor_subclass=None) -> None:
        super().__init__()
        self.home = home  # where it computes, if its weight is kept elsewhere (on the disk) until then
        self.base_layer = readable(base_layer)
        self.cuts: dict[str, Cut] = {}
        self.scaling: dict[str, float] = {}  # the strength of each adapter, beside the factor of its method
        self.merged_adapters: list[str] = []
        self.unmerged: Any = None  # what the base held before a merge
        self.unmerged_bias: Tensor | None = None
        self.called = self.weight_read = False  # in a forward pass, so far (see `first_pass`)
        self.marked: str | None = None  # the base's mark when it was last whole
        self.noise: tuple[Tensor, int] | None = None  # on the weight, in training: its size by rows, and its seed
        self.quantization_backend = resolve_quantization_backend(
            base_layer, get_apply_tensor_subclass=get_apply_tensor_subclass
        )
        self.in_features, self.out_features = self.sides(base_layer)

    def sides(self, base_layer: nn.Module) -> tuple[int, int]:
        """Return how many inputs and outputs the base layer has."""
        return cast(tuple[int, int], _get_in_out_features(base_layer))

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the names of the containers of θ and θ₀; which there are depends on the methods in use."""
        return tuple(name for name in self._modules if name.startswith(PREFIX))

    @property
    def weight(self) -> Tensor:
        """Return the base weight, and note that it was read: for its dtype, or past this layer."""
        if not torch.compiler.is_compiling():
            self.weight_read = True
        return cast(Tensor, self.get_base_layer().weight)

    # -- the base weight ------------------------------------------------------------------------------------------

    def matrix(self) -> Tensor:
        """Return the base weight as (out × in), dequantised where it is quantised."""
        if self.quantization_backend is not None:
            return self.get_base_weight()
        with align_module_device(self.base_layer):  # it may lie on the disk until it is used
            W = cast(Tensor, self.base_layer.weight)
        return W.T if isinstance(self.base_layer, Conv1D) else W

    def pristine(self) -> Tensor:
        """Return the base weight as (out × in), before any merge where that is kept as a tensor."""
        if self.unmerged is None or self.quantization_backend is not None:
            return self.matrix()
        return self.unmerged.T if isinstance(self.base_layer, Conv1D) else self.unmerged

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of `matrix`."""
        return self.out_features, self.in_features

    def shapes_of(self, name: str, method: Method) -> Params:
        """Return what θ of the adapter `name` is here, on the meta device."""
        return bounded_shapes(method, self.out_features, self.in_features)

    def stored_base(self) -> nn.Module:
        """Return the module that holds the base weight, without what PEFT puts around one whose tokens are trained."""
        base = self.base_layer
        while isinstance(base, AuxiliaryTrainingWrapper):
            base = cast(nn.Module, base.original_module)
        return base

    def check_plain_weight(self) -> None:
        """Raise a ValueError where the base weight is computed from other tensors, so that no merge can replace it."""
        if self.quantization_backend is None and own_weight(self.base_layer) is None:
            module = next((cut.module for cut in self.cuts.values()), "this layer")
            raise ValueError(
                f"{module}: its weight is computed from other tensors (a parametrisation, weight norm, pruning, "
                "trained tokens of tied embeddings), which a merge cannot replace; remove that first, or use the "
                "adapter unmerged"
            )

    def drop(self, name: str) -> Drop:
        """Return how the adapter `name` reads and keeps x in this step."""
        cut = self.cuts[name]
        return Drop(cut.method.dropout, cut.saver) if self.training else keep

    def change(self, name: str, W: Tensor) -> Tensor:
        """Return s (ΔW(θ) − ΔW(θ₀)) of one adapter over the weight W, (out × in), in fp32 (or better, where θ is)."""
        return change_of(*self.theta(name), W)

    def shift(self, name: str) -> Tensor | None:
        """Return s times what one adapter adds to the bias, (out), in fp32 at least; None where it leaves it alone."""
        return shift_of(*self.theta(name)[:2]) if self.cuts[name].method.shifts else None

    def parts_of(self, name: str) -> list[tuple[Method, Params]]:
        """Return method and θ of each weight that one adapter changes here."""
        return [self.theta(name)[:2]]

    def theta(self, name: str) -> tuple[Method, Params, Params | None]:
        cut = self.cuts[name]
        for layer in (self, cut.owner):
            if layer is not None and layer.cuts[name].pending:
                layer.settle(name)
        p = {k: self._value(PREFIX, k, name) for k in cut.symbols}
        method = cut.method.at_strength(float(self.scaling[name]))
        if not cut.start:
            return method, p, None
        return method, p, {k: self._value(START, k, name) if k in cut.start else p[k] for k in cut.symbols}

    def _holder(self, symbol: str, name: str) -> InlayLinear:
        """Return the layer whose slots hold a symbol."""
        cut = self.cuts[name]
        return self if cut.owner is None or symbol not in cut.method.shared else cut.owner

    def _value(self, prefix: str, symbol: str, name: str) -> Tensor:
        holder = self._holder(symbol, name)
        value = holder._held(prefix + symbol)[name]()
        if holder is self or (device := self._device()).type == "meta":
            return value
        return distributed.borrowed(value).to(device)

    def _held(self, container: str) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self._modules[container])

    # -- adapters come, are filled, go ----------------------------------------------------------------------------

    def update_layer(
        self, name: str, method: Method, inference_mode: bool = False, light: bool = False, **about: Any
    ) -> None:
        """Add an adapter with empty (NaN) slots, which `decompose` or a checkpoint fills.

        `about`: more of `Cut`. `light`: without memory until then (PEFT does so for parameters, not for buffers).

        One of the same name is replaced, as PEFT's layers do.
        """
        for container in self.adapter_layer_names:
            if name in self._held(container):
                self._held(container).pop(name)
        shapes = self.shapes_of(name, method)
        trained = tuple(k for k in shapes if k not in method.frozen)
        if about.get("saver", "none") != "none":
            check_saver(method, trained, about["saver"])
        start = () if method.stores_no_start or about.get("folded") else trained
        self.scaling[name] = 1.0
        self.cuts[name] = Cut(method, tuple(shapes), start, **about)
        device = torch.device("meta") if light else self._device()
        self._slots(name, {k: shape for k, shape in shapes.items() if k not in method.shared}, device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def settle_at(self, name: str, place: Place, owner: InlayLinear | None, light: bool, inference_mode: bool) -> None:
        """Set the place of an adapter, which is known when all layers are, and make the slots of its shared symbols."""
        cut = self.cuts[name]
        cut.method, cut.owner = cut.method.at(place), owner
        if cut.method.shared and owner is None:
            shapes = self.shapes_of(name, cut.method)
            device = torch.device("meta") if light else self._device()
            self._slots(name, {k: shape for k, shape in shapes.items() if k in cut.method.shared}, device)
            self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _slots(self, name: str, shapes: Params, device: torch.device) -> None:
        cut = self.cuts[name]
        for k, shape in shapes.items():
            self._slot(PREFIX + k, name, shape, k not in cut.method.frozen, device)
        for k in (k for k in shapes if k in cut.start):
            self._slot(START + k, name, shapes[k], False, device)

    def _slot(self, container: str, name: str, shape: Tensor, trainable: bool, device: torch.device) -> None:
        if container not in self._modules:
            self.add_module(container, nn.ModuleDict())
        empty = float("nan") if shape.is_floating_point() else torch.iinfo(shape.dtype).min
        value = torch.full(shape.shape, empty, dtype=shape.dtype, device=device)
        self._held(container)[name] = slot = Slot(value, trainable)
        if trainable and self.quantization_backend is not None:
            slot.watch()  # trl casts θ to bf16 on quantised bases, by replacing `.data`

    def has_bias(self) -> bool:
        """Return whether the base layer has a bias."""
        return "bias" in dict(self.base_layer.named_parameters(recurse=False))

    def _device(self) -> torch.device:
        return self.home or self._get_base_layer_device_and_dtype(self.base_layer)[0] or torch.device("cpu")

    def slots(self, name: str) -> dict[str, Slot]:
        """Return every stored tensor of one adapter, by its path in this layer."""
        cut = self.cuts[name]
        paths = [PREFIX + k for k in cut.own] + [START + k for k in cut.start if k in cut.own]
        return {f"{path}.{name}.weight": cast(Slot, self._held(path)[name]) for path in paths}

    def roles(self) -> Iterator[tuple[nn.Parameter, str]]:
        """Yield the parameters of all adapters here, each with the part it plays in its method."""
        for name, cut in self.cuts.items():
            for k in cut.own:
                weight = self._held(PREFIX + k)[name].weight
                if isinstance(weight, nn.Parameter):
                    yield weight, cut.method.role(k)

    def decompose(self, name: str, like: str | None = None) -> None:
        """Fill the slots with the method's start, from the base weight in fp32, or with that of the adapter `like`."""
        run_jobs(self.jobs(name, like))

    @property
    def seen(self) -> list[str]:
        """Return the names, in this layer, of the modules whose inputs and outputs `jobs` needs statistics of."""
        return ["base_layer"]

    def jobs(self, name: str, like: str | None = None, stats: list[Params] | None = None) -> Iterator[Job]:
        """Yield what is left to compute, after a copy of the adapter `like` is taken where it serves.

        Without the `stats` that its method needs, one for each module of `seen`, an adapter stays pending.
        """
        cut = self.cuts[name]
        blank = self._device().type == "meta"
        if cut.method.needs and not (stats or like in self.cuts or cut.folded or blank):
            return
        cut.pending = False
        if blank or not cut.own:  # a model without memory: shapes are all there is
            return
        if like in self.cuts and (cut.start or cut.folded or cut.method.needs):
            self._settle_start(name, like, self._start_of(like))
        elif cut.folded:
            raise ValueError(
                f"{cut.module}: a folded adapter has no start of its own; load one with its base, or make both with "
                "inlay.fold"
            )
        else:
            yield from self._jobs(name, like, stats)

    def _jobs(self, name: str, like: str | None, stats: list[Params] | None) -> Iterator[Job]:
        cut = self.cuts[name]
        yield Job(
            cut.method,
            (self.out_features, self.in_features),
            lambda: self.pristine().detach().float(),
            lambda start: self._settle_start(name, like, start),
            stats[0] if stats else None,
            None if cut.seed is None else ops.seed_of(cut.seed, cut.module),
        )

    @torch.no_grad()
    def _settle_start(self, name: str, like: str | None, start: Params) -> None:
        self.fill(name, start)
        if like is None or like not in self.cuts:
            return
        for k in self.cuts[name].own:
            mine, twin = (cast(Slot, self._held(PREFIX + k)[n]).weight for n in (name, str(like)))
            if not isinstance(twin, nn.Parameter):  # who copies an adapter copies its parameters, not its buffers
                mine.copy_(twin)

    @torch.no_grad()
    def fill(self, name: str, start: Params) -> None:
        """Fill the slots of θ and θ₀ from `start`."""
        cut, slots = self.cuts[name], self.slots(name)
        cut.pending = False
        for k in cut.own:
            weight = slots[f"{PREFIX}{k}.{name}.weight"].weight.copy_(start[k])
            if cut.perturb and k not in cut.method.frozen:
                weight.add_(torch.randn_like(weight), alpha=0.02)
        for k in (k for k in cut.start if k in cut.own):
            slots[f"{START}{k}.{name}.weight"].weight.copy_(start[k])

    def _start_of(self, name: str) -> Params:
        cut = self.cuts[name]
        return {k: self._held((START if k in cut.start else PREFIX) + k)[name]() for k in cut.own}

    def settle(self, name: str) -> None:
        """Resolve an adapter whose config came from a checkpoint: all slots loaded, or none and it is decomposed now.

        Empty slots are NaN (of integers: the least), which no valid checkpoint holds, so this needs no word from
        whoever loaded the tensors.
        """
        slots = self.slots(name)
        empty = [path for path, slot in slots.items() if slot.is_empty()]
        if empty and len(empty) == len(slots) and not any(slot.weight.is_meta for slot in slots.values()):
            if self.cuts[name].method.needs and not self.cuts[name].folded:
                check_seen(self.cuts[name].method, None)
            self.decompose(name)
        elif empty:
            raise ValueError(f"adapter {name!r} was not loaded whole: no values for {', '.join(empty)}")
        else:
            self.check_seal(name, {path: slot.weight for path, slot in slots.items()})
            self.cuts[name].pending = False

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load what `state_dict` holds; a part of an adapter only where the rest is what it was trained with."""
        for name, cut in self.cuts.items():
            paths = self.slots(name)
            missing = [path for path in paths if f"{prefix}{path}" not in state_dict]
            if len(missing) < len(paths) and (lost := [path for path in missing if not cut.is_rebuilt(path)]):
                args[-1].append(
                    f"{prefix}{lost[0]} is missing, and what a fresh {cut.method.name} adapter has in its place is "
                    "something else: save the whole adapter (save_pretrained, get_peft_model_state_dict), or, where it "
                    "is only drawn at random, set `seed` in the InlayConfig"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def advance(self, t: float) -> list[tuple[nn.Parameter, Tensor | None]]:
        """Let the active adapters' methods follow the training to its fraction t.

        Returns the parameters that an optimiser has to forget, those now frozen and those begun anew, with a mask where
        that is so of some entries.
        """
        forget: list[tuple[nn.Parameter, Tensor | None]] = []
        for name in (a for a in self.active_adapters if a in self.cuts):
            cut = self.cuts[name]
            method, p, _ = self.theta(name)
            for k, mask in sorted(self._restart(name, method, p, t).items()):
                weight = self._holder(k, name)._held(PREFIX + k)[name]()
                forget += [(weight, mask)] if isinstance(weight, nn.Parameter) else []
            frozen = method.schedule(p, t)
            for k in (k for k in cut.symbols if k not in method.frozen):
                slot = cast(Slot, self._holder(k, name)._held(PREFIX + k)[name])
                weight = slot.freeze() if k in frozen else slot.thaw()
                forget += [] if weight is None else [(weight, None)]
            cut.method = cut.method.at(replace(method.place, t=t))
        return forget

    def _restart(self, name: str, method: Method, p: Params, t: float) -> dict[str, Tensor | None]:
        begun = method.restart(seen := distributed.Gathered(p), t)
        seen.scatter()
        return begun

    def check_seal(self, name: str, tensors: dict[str, Tensor], base: Tensor | None = None) -> None:
        """Raise a ValueError unless `tensors`, which fill an adapter's slots, and the base weight bear its seal.

        `base`: the base weight that is loaded with them, where the file holds it (a head that grew).
        """
        cut = self.cuts[name]
        if not cut.pending or cut.seal is None:
            return
        if seal.of_tensors(strip(tensors, name)) != cut.seal.get("tensors"):  # a table of seals without one lost it
            raise ValueError(f"{cut.module}: {UNSEALED}")
        self.check_base(name, self.base_mark(cut.folded) if base is None else seal.of_base(base))

    def check_base(self, name: str, mark: str | None) -> None:
        """Raise a ValueError if a weight with this mark (None: unknown) is not what an adapter was cut from."""
        cut = self.cuts[name]
        expected = None if cut.seal is None else cut.seal.get("base")
        if not seal.same_base(mark, expected) or (cut.folded and not seal.same_kind(mark, expected)):
            raise ValueError(
                f"{cut.module}: the adapter was cut from another base model; load it on its own, or set "
                "config.seals = None to apply it here all the same"
            )

    def base_mark(self, folded: bool = False) -> str | None:
        """Return the mark of the base weight, of a sharded one from before it was sharded; None where it is unknown.

        A quantised weight has one only if `folded`: otherwise the same base in another quantisation serves as well.
        """
        if self.quantization_backend is not None:
            weight = self.unmerged[1]["weight"] if self.unmerged else self.base_layer.weight
            return seal.of_packed(cast(Tensor, weight)) if folded else None
        W = self.pristine()
        if isinstance(self.base_layer, AuxiliaryTrainingWrapper):  # whose tokens are no part of the base
            W = cast(Tensor, self.stored_base().weight)
        whole = W.shape == self.shape and seal.is_plain_tensor(W)
        if whole:
            self.marked = seal.of_base(W)
        return self.marked if whole or distributed.is_shard(W) else None

    def make_seal(self, name: str, tensors: dict[str, Tensor]) -> dict[str, str | None]:
        """Return the seal that `check_seal` compares with when these tensors are loaded again."""
        return {"tensors": seal.of_tensors(strip(tensors, name)), "base": self.base_mark(self.cuts[name].folded)}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter, but never round θ to the base's dtype (PEFT does both)."""
        device = device or self._device()
        if adapter_name not in self.cuts:
            return
        for slot in self.slots(adapter_name).values():
            if not slot.weight.is_meta and device.type != "meta":  # numbers that move there are lost
                slot.to(device)

    # -- strength -------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Use `adapter` at the strength `scale` from now on: y = W x + scale · s (ΔW(θ) − ΔW(θ₀)) x.

        Raises:
            ValueError: the scale is not a finite number, or the adapter is merged.
        """
        if adapter not in self.cuts:
            return
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale} is not a finite number")
        if adapter in self.merged_adapters:
            raise ValueError(f"adapter {adapter!r} is merged; unmerge it before its scale is changed")
        self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters by `scale`, as PEFT's layers do."""
        for name in self.active_adapters:
            if name in self.cuts:
                self.set_scale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters by `scale`; without one, set it to 1."""
        for name in self.active_adapters:
            if name in self.cuts:
                self.set_scale(name, 1.0 if scale is None else self.scaling[name] / scale)

    # -- forward and merge ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Return y, (..., out), for x, (..., in). `adapter_names`: the adapter of each row of x, if given."""
        if not torch.compiler.is_compiling() and not self.called:
            self.called = True
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._per_row(x, adapter_names, args, kwargs)
        active = () if self.disable_adapters else self.active_adapters
        y = self._under([name for name in active if name not in self.merged_adapters], args, kwargs)(x)
        noise = self.noise if self.training and not self.disable_adapters else None
        return y if noise is None else y + ops.weight_noise(x, *noise)

    def _under(self, names: list[str], args: tuple, kwargs: dict, base: Base | None = None) -> Base:
        """Return the layer (or `base`, in its place) with these adapters on it, each over the ones before."""
        layer: Base = base or Frozen(self, args, kwargs)
        for name in names:
            if name in self.cuts and self.scaling[name] != 0:
                layer = Adapted(self, name, layer)
        return layer

    def _per_row(self, x: Tensor, names: list[str], args: tuple, kwargs: dict) -> Tensor:
        """Return y for rows of several adapters; the rows of one adapter are computed together."""
        parts, order = [], []
        for name in dict.fromkeys(names):
            rows = [i for i, own in enumerate(names) if own == name]
            parts.append(self._under([name], args, kwargs)(x[rows]))
            order += rows
        return torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s (ΔW(θ) − ΔW(θ₀)) in the layout of the base layer's weight."""
        delta = self.change(adapter, self.pristine())
        return delta.T if isinstance(self.base_layer, Conv1D) else delta

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Return the norm of each row of the adapted weight, (out), of a sharded one in every process."""
        W = distributed.borrowed(self.matrix()).float()
        for name in (a for a in self.active_adapters if a in self.cuts and a not in self.merged_adapters):
            method, p, p0 = self.theta(name)
            W = W + change_of(method, {k: distributed.borrowed(v) for k, v in p.items()}, p0, W)
        return W.norm(dim=1)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight: summed in fp32, rounded once. The old weight is kept for `unmerge`.

        Raises:
            ValueError: with `safe_merge`, the merged weight is not finite; or it is too large for the base's dtype, or
                there is no bias to shift. The base is then untouched.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.cuts]
        if not names:
            return
        self.check_plain_weight()
        old = self.matrix()
        W = self._merged(old, names)
        bias = self._shifted_bias(names)
        if safe_merge and not (W.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(
                f"merging {', '.join(names)} gives NaN or Inf; the adapter is broken, the base is untouched"
            )
        self.check_range(W, old.dtype)
        if self.unmerged is None:
            self.unmerged = self._what_a_merge_replaces()
        self.set_base_weight((W.T if isinstance(self.base_layer, Conv1D) else W).to(old.dtype).contiguous())
        if bias is not None:
            held = cast(nn.Parameter, self.base_layer.bias)
            self.unmerged_bias = held.data if self.unmerged_bias is None else self.unmerged_bias
            held.data = bias.to(held.dtype)
        self.merged_adapters.extend(names)

    def check_range(self, W: Tensor, dtype: torch.dtype) -> None:
        """Raise a ValueError where a merged weight is finite and its numbers are too large for float16."""
        if dtype == torch.float16 and W.isfinite().all() and W.abs().max() > torch.finfo(dtype).max:
            module = next((cut.module for cut in self.cuts.values()), "a layer")
            raise ValueError(
                f"{module}: the merged weight reaches {W.abs().max():.3g}, and float16 ends at 65,504; load the base "
                "in bfloat16 or float32 and merge there"
            )

    @torch.no_grad()
    def merged_weight(self, names: list[str]) -> Tensor:
        """Return the weight that `merge` would give, in fp32 at least."""
        return self._merged(self.matrix(), names)

    def _merged(self, old: Tensor, names: list[str]) -> Tensor:
        """Return the weight with these adapters in it, each over those before, in fp32 at least."""
        W = old.to(torch.promote_types(old.dtype, torch.float32))
        for name in names:
            W = W + self.change(name, W).to(W.dtype)
        return W

    def _shifted_bias(self, names: list[str]) -> Tensor | None:
        """Return the base layer's bias with what adapters add to it, in fp32 at least; None where none does."""
        shifts = {name: shift for name in names if (shift := self.shift(name)) is not None}
        if not shifts:
            return None
        cut = self.cuts[next(iter(shifts))]
        bias = dict(self.base_layer.named_parameters(recurse=False)).get("bias")
        if bias is None or bias.is_meta:
            raise ValueError(
                f"{cut.module}: {cut.method.name} shifts the bias, and this layer has none in memory to merge it into; "
                "use the adapter unmerged"
            )
        return bias.to(torch.promote_types(bias.dtype, torch.float32)) + torch.stack([*shifts.values()]).sum(0)

    def _what_a_merge_replaces(self) -> Any:
        if self.quantization_backend is None:
            return cast(Tensor, self.base_layer.weight).data
        # A backend may swap the layer, its weight, or (8-bit bitsandbytes) the state that holds the scales.
        held = {k: copy.copy(v) for k, v in vars(self.base_layer).items() if k == "state"}
        return self.base_layer, {"weight": self.base_layer.weight, **held}

    def unmerge(self) -> None:
        """Put back the very weight that was there before the merge: bit-equal, for every method."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        if self.unmerged_bias is not None:
            bias = cast(nn.Parameter, self.base_layer.bias)
            bias.data, self.unmerged_bias = self.unmerged_bias.to(bias), None
        if self.quantization_backend is None:
            weight = cast(Tensor, self.base_layer.weight)
            weight.data = self.unmerged.to(weight)  # the model may have moved since
        else:
            self.base_layer, attributes = self.unmerged
            for key, value in attributes.items():
                setattr(self.base_layer, key, value)
        self.unmerged = None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def extra_repr(self) -> str:
        cuts = ", ".join(f"{name}: {cut.method}" for name, cut in self.cuts.items())
        return ", ".join(part for part in (cuts, quantization_extra_repr(self)) if part)
