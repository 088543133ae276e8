"""Check a method of your own against what Inlay asks of every method: `check_method`, for your tests.

Inlay's own tests ask more (`tests/methods`): quantised bases, dropout, torch.compile, several processes.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from inlay import outside
from inlay.host.calibrate import calibrate
from inlay.host.config import InlayConfig
from inlay.method import Method, Params

Reference = Callable[[Params, Tensor], Tensor]


class Layer:
    """Stand for a layer under the change: any weight, any bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor, /) -> Tensor:
        """Return W x + b."""
        return F.linear(x, self.weight, self.bias)


def check_method(method: Method, reference: Reference | None = None, shape: tuple[int, int] = (24, 40)) -> None:
    """Check that a method does what its class says, alone and in a model.

    Args:
        method: with hyperparameters that fit a small weight.
        reference: ΔW(θ) of θ and W, written down from the paper's equation and not from `delta`.
        shape: of the weight, out × in.

    Raises:
        AssertionError: it does not; the message says what.
        ValueError: the class is not complete, or a hyperparameter does not fit the shape.
    """
    outside.check_class(type(method))
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator)
    check_start(method, W)
    if method.linear:
        check_change(method, W.double(), reference)
    check_first_output(method, W)
    if method.linear:
        check_gradients(method, W.double())
    check_in_model(method, shape)


def started(method: Method, W: Tensor) -> Params:
    """Return θ₀, of statistics of random data where the method needs any; all draws are of one seed."""
    torch.manual_seed(1)
    stats: Params = {}
    if method.needs and not W.is_meta:
        rows = W.shape[1] if method.needs == "activations" else W.shape[0]
        for _ in range(3):
            stats = method.observe(stats, torch.randn(rows, W.shape[1]))
    torch.manual_seed(2)
    return method.start(W, stats or None)


def moved(method: Method, W: Tensor) -> tuple[Params, Params]:
    """Return θ away from its start, and θ₀, in W's dtype."""
    p0 = {k: v.to(W.dtype) if v.is_floating_point() else v for k, v in started(method, W.float()).items()}
    return {k: v if k in method.frozen else v + 0.3 * torch.randn_like(v) for k, v in p0.items()}, p0


def check_start(method: Method, W: Tensor) -> None:
    """Check the start: shapes on meta tensors, dtypes, and what the class says of it."""
    before = W.clone()
    p, meta = started(method, W), started(method, W.to("meta"))
    trained = p.keys() - method.frozen
    assert trained, "start gives nothing that is trained: every symbol is in `frozen`"
    assert list(p) == list(meta), f"start gives {list(p)}, and {list(meta)} on a meta tensor"
    for name, value in p.items():
        assert meta[name].is_meta, f"start on a meta tensor gives a real {name}"
        assert (meta[name].shape, meta[name].dtype) == (value.shape, value.dtype), f"{name} differs on a meta tensor"
        kinds = (torch.float32,) if name in trained else (torch.float32, torch.int32)
        assert value.dtype in kinds, f"{name} is {value.dtype}, and has to be float32 (int32 for positions)"
        assert value.isfinite().all(), f"{name} starts with NaN or Inf"
    again = started(method, W)
    torch.manual_seed(3)
    other = method.start(W) if not method.needs else again
    assert all(torch.equal(p[k], again[k]) for k in p), "two starts under one seed differ"
    same = all(torch.equal(p[k], other[k]) for k in p)
    assert same or method.draws, "the start draws random numbers, and the class does not say so: `draws = True`"
    if method.linear:
        zero = not method.delta(p, W).any()
        assert zero == method.zero_init, (
            f"ΔW(θ₀) is {'' if zero else 'not '}0, so say `zero_init = {zero}` in the class"
        )
    for value in p.values():
        value.add_(1)
    assert torch.equal(W, before), "start changes W, or gives a tensor that shares its memory; clone it"


def check_first_output(method: Method, W: Tensor) -> None:
    """Check that the layer's output at the start is the base's, in every dtype."""
    p = started(method, W)
    for narrow, dtype in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        base = Layer(W.to(dtype), torch.randn(len(W), dtype=dtype))
        cast = {k: v.to(narrow) if v.is_floating_point() else v for k, v in p.items()}
        x = torch.randn(9, W.shape[1], dtype=dtype)
        y = method.apply(cast, None if method.zero_init else p, x, base)
        assert y.dtype == dtype, f"with θ in {narrow} the layer gives {y.dtype} for {dtype}"
        assert torch.equal(y, base(x)), f"at the start the layer is not its base (θ {narrow}, layer {dtype})"


def check_change(method: Method, W: Tensor, reference: Reference | None) -> None:
    """Check `delta`: its shape, the reference, and whether it depends on W."""
    p, _ = moved(method, W)
    before = W.clone()
    D = method.delta(p, W)
    assert torch.equal(W, before), "delta changes W"
    assert D.shape == W.shape, f"ΔW is {tuple(D.shape)}, and W is {tuple(W.shape)}"
    if reference is not None:
        assert torch.allclose(D, reference(p, W), rtol=1e-10, atol=1e-10), "delta is not the reference"
    reads = not torch.equal(method.delta(p, 2 * W), D)
    assert reads == method.reads_weight, (
        f"ΔW {'depends' if reads else 'does not depend'} on W, so say `reads_weight = {reads}` in the class"
    )


def check_gradients(method: Method, W: Tensor) -> None:
    """Check that `apply` is y = W x + b + s (ΔW(θ) − ΔW(θ₀)) x, and its gradients those of `delta`."""
    for bias, scale in itertools.product((None, torch.randn(len(W), dtype=W.dtype)), (None, 0.37)):
        m = replace(method, scale=scale) if scale and method.scales else method
        p, p0 = moved(m, W)
        leaves = [x := torch.randn(2, 3, W.shape[1], dtype=W.dtype), *(v for k, v in p.items() if k not in m.frozen)]
        for leaf in leaves:
            leaf.requires_grad_()
        y = m.apply(p, None if m.zero_init else p0, x, Layer(W, bias))
        want = F.linear(x, W + m.s * (m.delta(p, W) - m.delta(p0, W)), bias)
        assert torch.allclose(y, want, rtol=1e-8, atol=1e-8), "apply is not the equation"
        g = torch.randn_like(y)
        for a, b in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(want, leaves, g), strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-8), "a gradient of apply is not that of the equation"


def check_in_model(method: Method, shape: tuple[int, int]) -> None:
    """Check the method in a model of PEFT's: it starts as its base, trains, is saved, loaded again and merged."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Tanh(), nn.Linear(shape[0], 3))
    x, state = torch.randn(8, shape[1]), {k: v.clone() for k, v in net.state_dict().items()}
    first = net(x)
    model = get_peft_model(net, InlayConfig(method=method, target_modules=["0"]))
    if method.needs:
        calibrate(model, [{"x": x}] * 2, loss=lambda m, batch: m(batch["x"]).square().mean())
    assert method.departs or torch.equal(model(x), first), "the adapted model does not start as its base"
    model(x).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.any() for p in trained), "no gradient reaches what is trained"
    with torch.no_grad():
        for p in trained:
            p.add_(0.05 * torch.randn_like(p))
    model.eval()
    y = model(x)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fresh = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Tanh(), nn.Linear(shape[0], 3))
        fresh.load_state_dict(state)
        again = PeftModel.from_pretrained(fresh, folder)
    assert torch.equal(again(x), y), "the adapter that is loaded again is not the one that was saved"
    if method.linear:
        merged = model.merge_and_unload()
        assert torch.allclose(merged(x), y, rtol=1e-4, atol=1e-5), "the merged model is not the adapted one"
