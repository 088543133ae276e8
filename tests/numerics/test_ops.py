"""The joined products against plain references: values, gradients (in fp64), what they keep, when they step aside."""

import importlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from contract import BY_NAME
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from sizes import DEPARTS, SIZES, sized
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from inlay.host.config import InlayConfig
from inlay.methods import METHODS
from inlay.numerics import linalg, ops
from inlay.numerics.ops import shared

ARGS = {**SIZES, "bone": {"r": 5}}

LOW_RANK = importlib.import_module("inlay.numerics.ops.low_rank")  # the file: `ops.low_rank` is the function


def factors(x, out: int, r: int, tiled: bool):
    B = torch.randn(out, r, dtype=torch.float64, requires_grad=True)
    return (B,) if tiled else (B, torch.randn(r, x.shape[-1], dtype=torch.float64, requires_grad=True))


def build(B, A=None):
    return 0.7 * B, A


@given(n=st.integers(1, 4), inp=st.integers(3, 9), out=st.integers(1, 6), r=st.integers(1, 3), tiled=st.booleans())
@settings(deadline=None, max_examples=12)
@pytest.mark.parametrize("linear", ["bias", "no bias", "beside"])
def test_low_rank_is_its_reference(linear, n, inp, out, r, tiled):
    """Also where the last of Bone's blocks is short, and beside a layer that is not joined."""
    torch.manual_seed(n)
    x = torch.randn(2, n, inp, dtype=torch.float64, requires_grad=True)
    joined = {"bias": lin(inp, out, True), "no bias": lin(inp, out, False), "beside": None}[linear]
    p = factors(x, out, r, tiled)
    y = ops.low_rank(x, joined, build, True, ops.keep, *p)
    wanted = ops.low_rank_reference(x, joined, *build(*p))
    torch.testing.assert_close(y, wanted)
    g = torch.randn_like(y)
    found, known = (torch.autograd.grad(out, (x, *p), g) for out in (y, wanted))
    torch.testing.assert_close(found, known)
    assert torch.autograd.gradcheck(lambda *v: ops.low_rank(v[0], joined, build, True, ops.keep, *v[1:]), (x, *p))


def lin(inp: int, out: int, bias: bool):
    W = torch.randn(out, inp, dtype=torch.float64)
    return W, torch.randn(out, dtype=torch.float64) if bias else None


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("kind", ["on x", "of twice the rank", "behind a frozen A", "behind a block sum"])
def test_dropout_from_a_seed(kind, joined, monkeypatch):
    """One mask in both passes, the one its seed gives; the share that is dropped, and the scale of the rest."""
    monkeypatch.setattr(shared, "SCRATCH", 64)  # several strips
    torch.manual_seed(0)
    n, inp, out, r, p = 40, 12, 10, 4, 0.25
    x = torch.randn(n, inp, dtype=torch.float64, requires_grad=True)
    linear = lin(inp, out, True) if joined else None
    B, *A = factors(x, out, r, kind == "behind a block sum")
    A = [A[0].detach()] if kind == "behind a frozen A" else A
    seed = int(torch.randint(1 << 62, (), generator=torch.Generator().manual_seed(7), device="cpu"))
    on_x, start = kind in ("on x", "of twice the rank"), [torch.randn_like(t) for t in (*A, B)]
    made = (
        ops.Pair(1.0, tuple(start))
        if kind == "of twice the rank"
        else lambda A, B=None: (A, None) if B is None else (B, A)
    )
    shape = (n, inp) if on_x else (n, r)
    mask = torch.cat([m.clone() for _, m in ops.masks(shape, x, p, seed)])
    assert mask.unique().tolist() == [0, 1 / (1 - p)]
    assert abs((mask == 0).double().mean() - p) < 0.1

    def ours(x, B, *A):
        torch.manual_seed(7)
        return ops.low_rank(x, linear, made, kind != "behind a frozen A", ops.Dropout(p), *A, B)

    def reference(x, B, *A):
        u = (x * mask) @ A[0].T if on_x else (x @ A[0].T if A else ops.block_sum(x, r)) * mask
        y = u @ B.T - ((x * mask) @ start[0].T @ start[1].T if kind == "of twice the rank" else 0)
        return y + (0 if linear is None else F.linear(x, *linear))

    wanted = [v for v in (x, B, *A) if v.requires_grad]
    y, known = ours(x, B, *A), reference(x, B, *A)
    torch.testing.assert_close(y, known)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, g), torch.autograd.grad(known, wanted, g))
    assert not torch.equal(ops.low_rank(x, linear, made, True, ops.Dropout(p), *A, B), y)


@given(p=st.floats(0.001, 0.999), seed=st.integers(0, 1 << 62), width=st.integers(1, 7), wide=st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_mask_drops_its_share_and_keeps_the_mean(p, seed, width, wide):
    like = torch.empty(0, dtype=torch.float32 if wide else torch.bfloat16)
    n = 40_001
    found = torch.cat([m.float().clone() for _, m in ops.masks((n, width), like, p, seed)])
    dropped, spread = (found == 0).double().mean(), (p * (1 - p) / found.numel()) ** 0.5
    assert abs(dropped - p) < 6 * spread + 2**-16
    assert torch.equal(found[found > 0].unique(), found.max()[None])
    assert found.max() == pytest.approx(1 / (1 - p), rel=(1e-6 if wide else 2**-8) + 2**-16 / (1 - p))
    other = torch.cat([m.float().clone() for _, m in ops.masks((n, width), like, p, seed + 1)])
    together = ((found == 0) & (other == 0)).double().mean()  # of another seed: unrelated
    assert abs(together - p**2) < 6 * (p**2 * (1 - p**2) / found.numel()) ** 0.5 + 2**-15


@pytest.mark.parametrize("linear", ["bias", "no bias", "beside"])
@pytest.mark.parametrize("step", [0, 2])
def test_dense_is_its_reference(step, linear, monkeypatch):
    """Built whole, and a few rows at a time."""
    monkeypatch.setattr(shared, "TALL", 4)
    monkeypatch.setattr(shared, "SCRATCH", 1)
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    joined = {"bias": lin(6, 10, True), "no bias": lin(6, 10, False), "beside": None}[linear]
    B, A = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((10, 2), (2, 6)))
    D = (
        ops.Rows(lambda B, A: (2 * B, A), lambda i, j, B, A: B[i:j] @ A, 10, step)
        if step
        else ops.Rows(lambda B, A: (2 * B @ A,))
    )
    assert len(D.strips(D.build(B, A), 6)) == (3 if step else 1)
    y = ops.dense(x, joined, D, B, A)
    torch.testing.assert_close(y, F.linear(x, 2 * B @ A) + (F.linear(x, *joined) if joined else 0))
    torch.testing.assert_close(y, ops.dense_reference(x, joined, D, B, A))
    assert torch.autograd.gradcheck(lambda *v: ops.dense(v[0], joined, D, *v[1:]), (x, B, A))


@given(
    n=st.integers(1, 5),
    r=st.sampled_from([1, 2, 3, 16, 40]),
    blocks=st.integers(1, 6),
    rows=st.integers(1, 3),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=12)
def test_bat_is_its_reference(n, r, blocks, rows, bias):
    """Blocks joined to larger ones or not, in strips of rows or not."""
    torch.manual_seed(n)
    x = torch.randn(2, n, blocks * r, dtype=torch.float64, requires_grad=True)
    B = torch.randn(blocks, r, r, dtype=torch.float64, requires_grad=True)
    linear = lin(blocks * r, rows * r, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "SCRATCH", 8 * 3 * blocks * r)
        y = ops.bat(x, linear, B)
        wanted = ops.bat_reference(x, lambda z: F.linear(z, *linear), B)
        torch.testing.assert_close(y, wanted)
        g = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, (x, B), g), torch.autograd.grad(wanted, (x, B), g))
    if blocks * r < 10:
        assert torch.autograd.gradcheck(lambda x, B: ops.bat(x, linear, B), (x, B))


@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
@pytest.mark.parametrize("method", ["bat", "bat_col", "dota"])
def test_half_precision_is_near_the_reference(method):
    """Products joined, rows built in bf16: as near fp64 as bf16 is."""
    torch.manual_seed(0)
    x, W = torch.randn(64, 48).bfloat16(), (0.2 * torch.randn(32, 48)).bfloat16()
    cut = {m.name: m for m in METHODS}[method](**sized(method, 8))
    p0 = cut.start(W.float())
    p = {k: (v + 0.1 * torch.randn_like(v)).requires_grad_() for k, v in p0.items()}
    found, known = [], []
    for dtype, into in ((torch.bfloat16, found), (torch.float64, known)):
        xs, Ws = x.to(dtype).requires_grad_(), W.to(dtype)
        base = Plain(Ws)
        y = (
            cut.apply(p, None if cut.zero_init else p0, xs, base)
            if dtype == torch.bfloat16
            else F.linear(xs, Ws + cut.offset({k: v.double() for k, v in p.items()}, None if cut.zero_init else p0, Ws))
        )
        into += [y, *torch.autograd.grad(y.square().sum() / 2, (xs, *p.values()))]
    for ours, theirs in zip(found, known, strict=True):
        assert (ours.double() - theirs.double()).norm() < 0.02 * theirs.double().norm()


class Plain:
    """The base of a plain frozen layer."""

    def __init__(self, W):
        self.weight, self.linear = W, (W, None)

    def __call__(self, x):
        return F.linear(x, self.weight)


def test_blocks_are_added_where_they_were_summed():
    """add_blocks is the transpose of block_sum: ⟨block_sum(x), v⟩ = ⟨x, add_blocks(0, v)⟩."""
    for inp, r in ((12, 4), (13, 4), (3, 5)):
        x, v = torch.randn(7, inp), torch.randn(7, r)
        torch.testing.assert_close((ops.block_sum(x, r) * v).sum(), (x * ops.add_blocks(torch.zeros(7, inp), v)).sum())


def layer(method: str, **more):
    torch.manual_seed(0)
    config = InlayConfig(method=method, args=ARGS[method], target_modules=["0"], **more)
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
@pytest.mark.parametrize("method", [m.name for m in METHODS if not m.needs])
def test_a_layer_with_a_hook_takes_the_plain_way_to_the_same_numbers(method):
    """A hook wants its layer called, so products cannot be joined."""
    model, x = layer(method), torch.randn(3, 7, 40)
    joined = step(model, x)
    seen = []
    base = model.base_model.model[0].base_layer
    base.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(step(model, x), joined, rtol=1e-4, atol=1e-5)
    assert seen


@pytest.mark.parametrize("method", [m.name for m in METHODS if not m.needs])
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_many_tokens_are_a_few_at_a_time(method, monkeypatch):
    """Where there are so many that W + B A is multiplied: the same values and gradients."""
    made = []
    monkeypatch.setattr(LOW_RANK, "sum_pays", lambda *about, pays=ops.sum_pays: made.append(pays(*about)) or made[-1])
    model, x = layer(method), torch.randn(120, 40)
    together = step(model, x)
    row = BY_NAME[method]
    joins = row.lora_exact if row.joins is None else row.joins
    assert made == [True] * joins
    apart = [step(model, part) for part in x.split(10)]
    assert not any(made[1:])
    torch.testing.assert_close(together[0], torch.cat([y for y, *_ in apart]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], torch.cat([dx for _, dx, *_ in apart]), rtol=1e-4, atol=1e-5)
    for i, total in enumerate(together[2:], 2):
        torch.testing.assert_close(total, sum(part[i] for part in apart), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", ["fp32", "fp64", "bf16", "reduced"])
def test_a_sum_is_multiplied_only_where_it_holds_a_small_change(factor):
    W = torch.empty(6, 4, dtype={"fp64": torch.float64, "bf16": torch.bfloat16}.get(factor, torch.float32))
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16" if factor == "reduced" else "ieee"
        assert ops.sum_pays(1000, W, False) is (factor in ("fp32", "fp64"))
        assert not ops.sum_pays(9, W, False)  # T > 4 out in / (out + in) = 9.6
        assert ops.sum_pays(10, W, False) is (factor in ("fp32", "fp64"))
        linear, D = (W.normal_(), None), torch.full((6, 4), 1e-4)  # a dense change as well
        x = torch.randn(50, 4, dtype=W.dtype)
        y = ops.dense(x, linear, ops.Rows(lambda D: (D,)), D)
        assert torch.equal(y, F.linear(x, W)) is False
        beside = F.linear(x, W).addmm_(x, D.to(W.dtype).T)
        assert torch.equal(y, beside) is (factor in ("bf16", "reduced"))
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("tokens", [7, 3000])
@pytest.mark.parametrize("method", [m.name for m in METHODS if not m.needs])
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_a_layer_with_a_bias_starts_exactly(method, tokens, monkeypatch):
    """So wide that a product is summed in parts: its bias comes first in nn.Linear, and one rounding differs if not."""
    monkeypatch.setattr(shared, "SCRATCH", 1504 * 40)  # several strips
    monkeypatch.setattr(shared, "TALL", 40)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(1504, 96))
    x = torch.randn(tokens, 1504)
    y = base(x)
    config = InlayConfig(method=method, args=SIZES[method], target_modules=["0"])
    assert torch.equal(get_peft_model(base, config)(x), y) != (method in DEPARTS)


@pytest.mark.parametrize("method", [m.name for m in METHODS if not m.needs])
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
@pytest.mark.parametrize("joined", [True, False])
def test_what_a_layer_keeps(method, joined, monkeypatch):
    """x by reference where an input-sided factor is trained, and little more; a frozen A or a block sum needs no x."""
    monkeypatch.setattr(LOW_RANK, "sum_pays", lambda *_: joined)
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
    assert (held is not None) is BY_NAME[method].keeps_x
    inside = 2 * x  # as between two layers: alive only while something refers to it
    ref = weakref.ref(inside)
    y = model(inside)
    del inside
    assert (ref() is not None) is (held is not None)
    assert y.requires_grad
    # MoRA is 16 wide here, and keeps s M; its turned blocks one that was filled up; RandLoRA's bases are 24 together,
    # XGBLoRA's rounds 64. PiSSA and the like, of twice the rank with their start, keep but half of it.
    built = 24 * 8  # B, where it is built from more than one tensor
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) <= (512 * BY_NAME[method].width + built) * 4


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
    low_rank = ops.low_rank
    monkeypatch.setattr(ops, "low_rank", lambda *a: (calls.append(a) if a[1] else None) or low_rank(*a))
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


def test_tiles_that_are_kept_serve_every_later_step():
    """What is fake or without memory is not kept."""
    ops.tiled.cache_clear()
    with FakeTensorMode():
        assert type(ops.tiles(4, 10, torch.empty(2, dtype=torch.bfloat16))) is not torch.Tensor
    ops.tiles(4, 10, torch.empty(2, dtype=torch.bfloat16, device="meta"))
    assert ops.tiled.cache_info().currsize == 0
    first, again = (ops.tiles(4, 10, torch.empty(2, dtype=torch.bfloat16)) for _ in range(2))
    assert first is again
    assert torch.equal(first, torch.eye(4, dtype=torch.bfloat16).repeat(1, 3)[:, :10])
    assert not torch.equal(first, ops.tiles(5, 10, torch.empty(2, dtype=torch.bfloat16))[:4])


@pytest.mark.parametrize("inp", [40, 43])
def test_blocks_in_half_precision(inp):
    """There the block sum is a product with tiled identities, rounded once: values and gradients near those of fp64."""
    torch.manual_seed(0)
    x, W = torch.randn(64, inp).bfloat16(), torch.randn(24, inp).bfloat16()
    B = torch.randn(24, 5, requires_grad=True)
    x1, x2 = x.clone().requires_grad_(), x.double().requires_grad_()
    y = ops.low_rank(x1, (W, None), lambda B: (B, None), True, ops.keep, B)
    wanted = ops.low_rank_reference(x2, (W.double(), None), B, None)
    g = torch.randn_like(y)
    ours = (y, *torch.autograd.grad(y, (x1, B), g))
    theirs = (wanted, *torch.autograd.grad(wanted, (x2, B), g.double()))
    for found, known in zip(ours, theirs, strict=True):
        assert (found.double() - known.double()).norm() < 0.01 * known.double().norm()


@pytest.mark.parametrize("method", [m.name for m in METHODS if not m.needs])
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_no_tokens_at_all(method):
    """As an expert of a mixture sees them when none is routed to it."""
    model = layer(method)
    x = torch.randn(2, 0, 40, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.shape == (2, 0, 24)
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
