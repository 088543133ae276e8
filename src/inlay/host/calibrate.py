"""The pass over a few batches that data-driven starts need: one layer's inputs or gradient at a time, reduced at once.

No gradient of a weight is ever stored. Each layer's is formed in the backward pass, from its input and its output's
gradient, handed to its method's `observe`, and freed before the next layer's: memory is that of a training step of the
base (each adapted layer keeps its input until then), one fp32 gradient, and the statistics. So it works on quantised
and frozen bases alike. Layers that read the same input share one statistic of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from inlay.host.compute_starts import run_jobs
from inlay.host.experts import InlayExperts
from inlay.host.layer import InlayLinear
from inlay.method import Method, Params
from inlay.numerics import linalg

MOST = 32  # batches
MASKS = ("attention_mask", "decoder_attention_mask")
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Hold the result of a calibration pass: how many batches it took, and the statistics of the data by module.

    `unsettled`: the modules whose method tells when it has seen enough, and had not.
    """

    batches: int
    stats: dict[str, Params]
    unsettled: list[str]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    adapter_name: str = "default",
    most: int = MOST,
    loss: Loss | None = None,
) -> Calibration:
    """Give an adapter whose method starts from data its start, once, after `get_peft_model` and before its first use.

    model = get_peft_model(base, InlayConfig(method="eva", target_modules="all-linear"))
    inlay.calibrate(model, batches)

    The base alone is run, without dropout. The start is stored with the adapter: nothing is calibrated at load. In
    several processes, give all of them the same batches.

    Args:
        model: adapted.
        batches: keyword arguments of the model, such as input_ids, attention_mask and labels; an `attention_mask` (and
            `decoder_attention_mask`, if it is of another length) says which tokens are none.
        adapter_name: the adapter to start.
        most: so many batches at most; fewer where every layer has seen enough.
        loss: what of (model, batch) is differentiated; by default the model's own loss, for which batches have labels.

    Raises:
        ValueError: the adapter needs no data or has its start already, there are too few, or they have no loss.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, InlayLinear) and adapter_name in module.cuts and module.cuts[adapter_name].method.needs
    }
    if not layers:
        raise ValueError(
            f"adapter {adapter_name!r} starts from the weights alone, or is not there: nothing to calibrate"
        )
    if not all(layer.cuts[adapter_name].pending for layer in layers.values()):
        raise ValueError(f"adapter {adapter_name!r} has its start already; calibrate before the first use, and once")
    seen = {name: [f"{name}.{part}" for part in layer.seen] for name, layer in layers.items()}
    methods = {part: layers[name].cuts[adapter_name].method for name, parts in seen.items() for part in parts}
    with watched_experts(layers.values()):
        result = gather_statistics(model, methods, batches, most, loss)
    stats = {name: of_every_part(name, [result.stats[part] for part in parts]) for name, parts in seen.items()}
    run_jobs(job for name, layer in layers.items() for job in layer.jobs(adapter_name, stats=stats[name]))
    return Calibration(
        result.batches,
        {part: own for name, parts in seen.items() for part, own in zip(layers_named(parts), stats[name], strict=True)},
        layers_named(result.unsettled),
    )


def layers_named(parts: Iterable[str]) -> list[str]:
    """Return the names of layers, or experts, without the word that PEFT puts in them."""
    return [part.replace(".base_layer", "") for part in parts]


def of_every_part(name: str, stats: list[Params]) -> list[Params]:
    """Return statistics of every expert of a layer: one that was given no tokens takes those of the first that was.

    Raises:
        ValueError: none was.
    """
    some = next((own for own in stats if own), None)
    if some is None:
        raise ValueError(f"{name} was given no tokens; give more batches, or leave it out")
    return [own or some for own in stats]


def gather_statistics(
    model: nn.Module,
    methods: Mapping[str, Method],
    batches: Iterable[Any],
    most: int | None = MOST,
    loss: Loss | None = None,
) -> Calibration:
    """Return the statistics that `methods` need of linear modules of `model`, adapted or not, by the modules' names.

    Raises:
        ValueError: there is no batch or no loss, or a module was given no tokens.
    """
    watchers = {name: Watcher(method) for name, method in methods.items()}
    gradients = any(method.needs == "gradients" for method in methods.values())
    device, count = next(p.device for p in model.parameters()), 0
    with still(model), ExitStack() as hooks:
        for name, watcher in watchers.items():
            hooks.callback(model.get_submodule(name).register_forward_hook(watcher.hook(watchers.values())).remove)
        for batch in tqdm(islice(batches, most), desc="Calibrating", unit="batch", disable=None, delay=1):
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            for watcher in watchers.values():
                watcher.masks = [batch[key] for key in MASKS if batch.get(key) is not None]
            with torch.set_grad_enabled(gradients):
                value = loss(model, batch) if loss else own_loss(model, batch, gradients)
            if gradients:
                value.backward()
            count += 1
            if all(watcher.settled for watcher in watchers.values()):
                break
    stats = {name: watcher.collected for name, watcher in watchers.items()}
    if empty := [n for n, collected in stats.items() if not collected and not n.rpartition(".")[2].isdigit()]:
        raise ValueError(
            f"{empty[0]} was given no tokens in {count} batches; give more, or leave it out of target_modules"
        )
    tell = [name for name, watcher in watchers.items() if type(watcher.method).settled is not Method.settled]
    return Calibration(count, stats, [name for name in tell if not watchers[name].settled])


class Watcher:
    """Collect the statistics of one module for its method, or share those of a module that reads the same input."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.stats: Params = {}
        self.settled = False
        self.masks: list[Tensor] = []
        self.leader: Watcher | None = None
        self.input: Any = lambda: None  # a weak reference to the last one

    @property
    def collected(self) -> Params:
        return self.stats if self.leader in (self, None) else self.leader.stats  # type: ignore[union-attr]

    def hook(self, everyone: Iterable[Watcher]) -> Callable[[nn.Module, tuple, Tensor], Tensor | None]:
        """Return a forward hook that looks at the inputs, or puts a `Tap` on the output."""

        def look(module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
            x = args[0]
            if self.method.needs == "gradients":
                return Tap.apply(y, x.detach(), self, y.new_zeros((), requires_grad=True))
            if self.leader is None:
                alike = (w for w in everyone if w.input() is x and w.method == self.method)
                self.leader = next(alike, self)
            if self.leader is self:
                self.input = weakref.ref(x)
                self.see(tokens(x.detach(), self.masks))
            self.settled = self.leader.settled
            return None

        return look

    def see(self, value: Tensor) -> None:
        if value.numel() and not self.settled:
            with linalg.full_precision(value.device):
                self.stats = self.method.observe(self.stats, value.float())
                self.settled = self.method.settled(self.stats)


class Tap(torch.autograd.Function):
    """Pass y on as it is, and show its layer's weight gradient gᵀx to a watcher in the backward pass, then free it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, watcher: Watcher, leaf: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.watcher = watcher
        return y.clone()  # a view could not be changed in place by who comes next

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        (g,), (x,) = grads, ctx.saved_tensors
        if not ctx.watcher.settled and x.numel():
            ctx.watcher.see(g.flatten(0, -2).float().T @ x.flatten(0, -2).float())
        return g, None, None, None


def tokens(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Return inputs (..., in) as (tokens × in), without those that the mask of their shape marks as padding."""
    mask = next((mask for mask in masks if mask.shape == x.shape[:-1]), None)
    return x.flatten(0, -2) if mask is None else x[mask.bool()]


def own_loss(model: nn.Module, batch: dict[str, Any], needed: bool) -> Tensor:
    """Return a model's own mean loss of a batch.

    Raises:
        ValueError: it is needed, and the model gives none.
    """
    value = getattr(model(**batch), "loss", None)
    if needed and value is None:
        raise ValueError("gradients need a loss, and the model gave none: give batches with labels, or a `loss`")
    return value  # type: ignore[return-value]


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Switch dropout off in this block, and gradients of all that is trained."""
    training = [module for module in model.modules() if module.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def watched_experts(layers: Iterable[InlayLinear]) -> Iterator[None]:
    """Switch all adapters of `layers` off in this block, and let each of their experts be a module to hook."""
    layers = list(layers)
    with without_adapters(layers), ExitStack() as watched:
        for layer in layers:
            if isinstance(layer, InlayExperts):
                watched.enter_context(layer.base_layer.watched())
        yield


@contextmanager
def without_adapters(layers: Iterable[InlayLinear]) -> Iterator[None]:
    """Switch all adapters of `layers` off in this block."""
    was = [(layer, layer.disable_adapters) for layer in layers]
    try:
        for layer, _ in was:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in was:
            layer._disable_adapters = disabled
