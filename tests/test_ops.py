"""The joined products against plain references: values, gradients (in fp64), what they keep, when they step aside."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from inlay import InlayConfig, linalg, ops
from inlay.methods import METHODS

ARGS = {"dota": {"bond": 4}, "bone": {"r": 5}}


def factors(x, out: int, r: int, tiled: bool):
    B = torch.randn(out, r, dtype=torch.float64, requires_grad=True)
    return (B,) if tiled else (B, torch.randn(r, x.shape[-1], dtype=torch.float64, requires_grad=True))


def build(B, A=None):
    return 0.7 * B, A


@given(n=st.integers(1, 4), inp=st.integers(3, 9), out=st.integers(1, 6), r=st.integers(1, 3), tiled=st.booleans())
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("bias", [False, True])
def test_low_rank_is_its_reference(bias, n, inp, out, r, tiled):
    """Also where the last of Bone's blocks is short."""
    torch.manual_seed(n)
    x = torch.randn(2, n, inp, dtype=torch.float64, requires_grad=True)
    W, b = torch.randn(out, inp, dtype=torch.float64), torch.randn(out, dtype=torch.float64) if bias else None
    p = factors(x, out, r, tiled)
    y = ops.low_rank(x, W, b, build, True, *p)
    wanted = ops.low_rank_reference(x, W, b, *build(*p))
    torch.testing.assert_close(y, wanted)
    g = torch.randn_like(y)
    found, known = (torch.autograd.grad(out, (x, *p), g) for out in (y, wanted))
    torch.testing.assert_close(found, known)
    assert torch.autograd.gradcheck(lambda *v: ops.low_rank(v[0], W, b, build, True, *v[1:]), (x, *p))


@pytest.mark.parametrize("bias", [False, True])
def test_dense_is_its_reference(bias):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    W, b = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64) if bias else None
    B, A = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 2), (2, 6)))
    y = ops.dense(x, W, b, torch.matmul, B, A)
    torch.testing.assert_close(y, F.linear(x, W + B @ A, b))
    assert torch.autograd.gradcheck(lambda *v: ops.dense(v[0], W, b, torch.matmul, *v[1:]), (x, B, A))


def test_blocks_are_added_where_they_were_summed():
    """add_blocks is the transpose of block_sum: ⟨block_sum(x), v⟩ = ⟨x, add_blocks(0, v)⟩."""
    for inp, r in ((12, 4), (13, 4), (3, 5)):
        x, v = torch.randn(7, inp), torch.randn(7, r)
        torch.testing.assert_close((ops.block_sum(x, r) * v).sum(), (x * ops.add_blocks(torch.zeros(7, inp), v)).sum())


def layer(method: str, **more):
    torch.manual_seed(0)
    config = InlayConfig(method=method, args=ARGS.get(method, {"r": 4}), target_modules=["0"], **more)
    model = get_peft_model(nn.Sequential(nn.Linear(40, 24)), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.05)
    return model


def step(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return y.detach(), x.grad, *grads


@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
@pytest.mark.parametrize("method", [m.name for m in METHODS])
def test_a_layer_with_a_hook_takes_the_plain_way_to_the_same_numbers(method):
    """A hook wants its layer called, so products cannot be joined."""
    model, x = layer(method), torch.randn(3, 7, 40)
    joined = step(model, x)
    seen = []
    base = model.base_model.model[0].base_layer
    base.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(step(model, x), joined, rtol=1e-4, atol=1e-5)
    assert seen


@pytest.mark.parametrize("method", [m.name for m in METHODS])
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_what_a_layer_keeps(method):
    """x by reference where an input-sided factor is trained, and little more; a frozen A or a block sum needs no x."""
    model = layer(method)
    x = torch.randn(512, 40, requires_grad=True)
    model(x)  # draws the bases that layers share
    shared = linalg._NOISE.values()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *shared]}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    held = kept.pop(x.untyped_storage().data_ptr(), None)
    assert (held is not None) is (method not in ("lamda", "bone", "svfit", "loldu", "mora", "randlora"))
    # MoRA is 16 wide here, with one block filled up; RandLoRA's bases are 24 wide together.
    width = {"bat": 40, "mora": 16, "mora_rope": 18, "randlora": 24}.get(method, 8)
    assert sum(t.nbytes for t in kept.values()) <= 512 * width * 4


def test_a_patched_or_watched_layer_is_called():
    model, x = layer("pissa"), torch.randn(3, 40)
    base = base_of(model)
    before, forward = model(x), base.forward
    base.forward = lambda x: 2 * forward(x)
    torch.testing.assert_close(model(x), before + forward(x))
    del base.forward
    seen = []
    base.register_full_backward_hook(lambda *_: seen.append(1))
    model(x.requires_grad_()).sum().backward()
    assert seen


def base_of(model):
    return model.base_model.model[0].base_layer


@pytest.mark.parametrize("what", ["trained weight", "trained bias", "autocast", "half", "arguments"])
def test_products_are_joined_only_where_a_layer_is_nothing_else(what, monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "low_rank", lambda *a: calls.append(a) or ops.low_rank_reference(*a[:3], *a[3](*a[5:])))
    model, x = layer("pissa"), torch.randn(3, 40)
    model(x)
    assert len(calls) == 1
    if what == "trained weight":
        base_of(model).weight.requires_grad_(True)
        model(x)
    elif what == "trained bias":
        base_of(model).bias.requires_grad_(True)
        model(x)
    elif what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    elif what == "half":
        base_of(model).bfloat16()
        with pytest.raises(RuntimeError):  # as the plain layer says: another dtype than its input's
            model(x)
    else:
        model.add_adapter("other", InlayConfig(method="pissa", args={"r": 2}, target_modules=["0"]))
        model.base_model.set_adapter(["default", "other"])
        model(x)
        assert len(calls) == 2  # the one that lies on the layer itself; the other lies on that
        return
    assert len(calls) == 1


@pytest.mark.parametrize("inp", [40, 43])
def test_blocks_in_half_precision(inp):
    """There the block sum is a product with tiled identities, rounded once: values and gradients near those of fp64."""
    torch.manual_seed(0)
    x, W = torch.randn(64, inp).bfloat16(), torch.randn(24, inp).bfloat16()
    B = torch.randn(24, 5, requires_grad=True)
    x1, x2 = x.clone().requires_grad_(), x.double().requires_grad_()
    y = ops.low_rank(x1, W, None, lambda B: (B, None), True, B)
    wanted = ops.low_rank_reference(x2, W.double(), None, B, None)
    g = torch.randn_like(y)
    ours = (y, *torch.autograd.grad(y, (x1, B), g))
    theirs = (wanted, *torch.autograd.grad(wanted, (x2, B), g.double()))
    for found, known in zip(ours, theirs, strict=True):
        assert (found.double() - known.double()).norm() < 0.01 * known.double().norm()
