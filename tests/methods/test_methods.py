"""Every method against its row of the contract: shapes, starts, the equation, gradients."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from contract import CONTRACT, Under, begin, cast, every_method, every_row, given, largest, low_rank, taken_off, theta

from inlay import methods
from inlay.method import Diagonal, LowRank, Method
from inlay.numerics.ops import shared

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


def test_every_method_has_a_row():
    assert {row.method.name for row in CONTRACT.values()} == {m.name for m in methods.METHODS}
    assert len({m.name for m in methods.METHODS}) == len(methods.METHODS)


@every_method
def test_a_method_is_found_by_its_name_and_is_final(row):
    cls = type(row.method)
    assert methods.find(row.method.name) is cls
    assert cls.__bases__[0] in (Method, LowRank, Diagonal)
    assert all(getattr(cls, field) for field in ("title", "equation", "paper", "trains"))


@every_row
def test_init_gives_the_shapes_and_the_count_of_the_formula(row):
    W = torch.randn(row.shape)
    p = begin(row.method, W)
    assert set(p) - row.method.frozen == row.trained
    assert sum(v.numel() for k, v in p.items() if k in row.trained) == row.numbers(*row.shape)
    assert {v.dtype for k, v in p.items() if k in row.trained} == {torch.float32}
    assert {v.dtype for v in p.values()} <= {torch.float32, torch.int32}  # positions
    assert all(v.isfinite().all() for v in p.values())


@every_row
def test_init_on_meta_tensors_gives_the_same_shapes_and_allocates_nothing(row):
    real, meta = begin(row.method, torch.randn(row.shape)), begin(row.method, torch.empty(row.shape, device="meta"))
    assert list(meta) == list(real)
    for k in real:
        assert meta[k].is_meta
        assert (meta[k].shape, meta[k].dtype) == (real[k].shape, real[k].dtype)


@every_row
def test_init_leaves_the_weight_alone_and_shares_no_memory_with_it(row):
    W = torch.randn(row.shape)
    before = W.clone()
    for value in begin(row.method, W).values():
        value.add_(1)
    assert torch.equal(W, before)


@every_row
def test_zero_init_says_the_truth(row):
    W = torch.randn(row.shape)
    start = row.delta(begin(row.method, W), W)
    assert (largest(start) == 0) == row.method.zero_init


@every_row
def test_a_start_is_deterministic_under_a_seed(row):
    W = torch.randn(row.shape)
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        starts.append(begin(row.method, W))
    assert all(torch.equal(starts[0][k], starts[1][k]) for k in starts[0])
    assert all(torch.equal(starts[0][k], starts[2][k]) for k in starts[0]) != row.seeded


@every_row
def test_delta_is_the_equation_of_the_paper(row):
    W = torch.randn(row.shape, dtype=torch.float64)
    method, p, _ = theta(row, W)
    before = W.clone()
    torch.testing.assert_close(method.delta(p, W), row.delta(p, W), rtol=1e-12, atol=1e-12)
    assert torch.equal(W, before)


@every_row
@pytest.mark.parametrize(
    ("bias", "lead", "scale"),
    [(False, (5,), None), (True, (2, 3), 0.37), (True, (1, 1), None), (False, (1, 1), 0.37)],
    ids=["2d", "bias-3d-s=.37", "bias-one token", "one token-s=.37"],
)
def test_apply_is_the_equation_with_its_gradients(row, bias, lead, scale):
    out, inp = row.shape
    W = torch.randn(out, inp, dtype=torch.float64)
    b = torch.randn(out, dtype=torch.float64) if bias else None
    method, p, p0 = theta(row, W, scale)
    x = torch.randn(*lead, inp, dtype=torch.float64)
    g = torch.randn(*lead, out, dtype=torch.float64)
    leaves = [x, *(p[k] for k in sorted(row.trained))]
    for leaf in leaves:
        leaf.requires_grad_()
    y = method.apply(p, given(method, p0), x, Under(W, b))
    expected = F.linear(x, W, b) + method.s * F.linear(x, row.delta(p, W) - taken_off(row, p0, W))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for got, want in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert largest(want) > 0
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def differs_from_lora(name: str) -> bool:
    """Whether the passes of a row are others than those of a plain B A, which two rows stand for."""
    return name in ("lora", "pissa") or CONTRACT[name].delta is not low_rank


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=name) for name, r in CONTRACT.items() if not r.stops and differs_from_lora(name)]
)
def test_gradcheck_of_apply(row):
    W = torch.randn(row.shape, dtype=torch.float64)
    method, p, p0 = theta(row, W, 0.5)
    names = sorted(row.trained)

    def layer(x, *values):
        return method.apply({**p, **dict(zip(names, values, strict=True))}, given(method, p0), x, Under(W))

    inputs = [torch.randn(2, row.shape[1], dtype=torch.float64), *(p[k] for k in names)]
    assert torch.autograd.gradcheck(layer, [i.detach().requires_grad_() for i in inputs])


@every_row
def test_the_change_depends_on_the_weight_exactly_where_it_says_so(row):
    """Only then is ΔW built again, and its gradient right, where another adapter lies under this one."""
    W = torch.randn(row.shape, dtype=torch.float64)
    method, p, _ = theta(row, W)
    assert torch.equal(method.delta(p, 2 * W), method.delta(p, W)) != method.reads_weight


@every_method
def test_the_size_is_a_hyperparameter_that_sets_how_much_is_trained(row):
    method = row.method
    names = {f.name for f in dataclasses.fields(method)}
    assert method.size in (names | {None} if "r" not in names else {"r"})
    if method.size is not None:
        field = next(f for f in dataclasses.fields(method) if f.name == method.size)
        assert (type(field.default), field.metadata["min"]) == (int, field.metadata["min"])


@every_method
def test_a_method_takes_a_scale_or_refuses_it_by_name(row):
    if row.method.scales:
        assert dataclasses.replace(row.method, scale=0.37).s == 0.37
    else:
        with pytest.raises(ValueError, match=f"{row.method.name}: scale=0.37 would undo its equation"):
            dataclasses.replace(row.method, scale=0.37)


@every_row
@pytest.mark.parametrize("frozen", ["x", "parameters"])
def test_apply_without_a_gradient_on_one_side(row, frozen):
    """The first layer of a model gets an x that needs no gradient, and an inference pass has no trained numbers."""
    W = torch.randn(row.shape, dtype=torch.float64)
    method, p, p0 = theta(row, W)
    x = torch.randn(3, row.shape[1], dtype=torch.float64, requires_grad=frozen != "x")
    for k in row.trained:
        p[k].requires_grad_(frozen != "parameters")
    leaves = [x] if frozen == "parameters" else [p[k] for k in sorted(row.trained)]
    expected = F.linear(x, W + method.s * (row.delta(p, W) - taken_off(row, p0, W))).square().sum()
    got = method.apply(p, given(method, p0), x, Under(W)).square().sum()
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_row
def test_apply_at_the_start_is_the_base_whatever_the_dtypes(row):
    W = torch.randn(row.shape)
    p = begin(row.method, W)
    for theta_dtype, x_dtype in itertools.product((torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16)):
        base = Under(W.to(x_dtype), torch.randn(row.shape[0], dtype=x_dtype))
        narrow = {k: cast(v, theta_dtype) for k, v in p.items()}
        x = torch.randn(9, row.shape[1], dtype=x_dtype)
        y = row.method.apply(narrow, given(row.method, p), x, base)
        assert y.dtype == x_dtype
        assert (largest(y - base(x)) == 0) != row.method.departs


def test_bat_col_in_many_strips_is_bat_col_in_one(monkeypatch):
    row = CONTRACT["bat_col"]
    W = torch.randn(row.shape, dtype=torch.float64)
    method, p, _ = theta(row, W)
    x = torch.randn(2, 3, row.shape[1], dtype=torch.float64, requires_grad=True)
    p["B"].requires_grad_()
    results = []
    for scratch in (1 << 20, 8 * row.shape[1] * 2, 1):
        monkeypatch.setattr(shared, "SCRATCH", scratch)
        y = method.apply(p, None, x, Under(W))
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, p["B"]])))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)
