"""Tensor trains: factors, TT-SVD, gauge, contraction; and what is particular to DoTA."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inlay.methods.dota import DoTA
from inlay.numerics import tensor_trains

large = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")


def shapes_of(m: int, n: int, cores: int, bond: int = 10**9) -> list[tuple[int, ...]]:
    return tensor_trains.shapes(tensor_trains.factorise(m, cores), tensor_trains.factorise(n, cores), bond)


def interleaved(W: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    """W as an array over (o_1, i_1, ..., o_N, i_N), in fp64."""
    N = len(shapes)
    axes = [axis for k in range(N) for axis in (k, N + k)]
    return W.double().reshape([s[1] for s in shapes] + [s[2] for s in shapes]).permute(axes)


def tails(W: Tensor, shapes: list[tuple[int, ...]]) -> list[float]:
    """Per bond, the norm of the singular values of W's unfolding beyond the bond."""
    A, found, rows = interleaved(W, shapes).contiguous(), [], 1
    for shape in shapes[:-1]:
        rows *= shape[1] * shape[2]
        found.append(torch.linalg.svdvals(A.reshape(rows, -1))[shape[3] :].norm().item())
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def decaying(m: int, n: int, rank: int | None = None) -> Tensor:
    k = rank or min(m, n)
    return torch.randn(m, k) * (0.8 ** torch.arange(k)) @ torch.randn(k, n)


# Factors


@pytest.mark.parametrize(
    ("dimension", "factors"),
    [
        (768, [3, 4, 4, 4, 4]),
        (1024, [4, 4, 4, 4, 4]),
        (3072, [4, 4, 8, 6, 4]),
        (4096, [4, 4, 8, 8, 4]),
        (11008, [4, 4, 43, 4, 4]),
        (11008, [16, 43, 16]),
        (4096, [16, 16, 16]),
        (192, [2, 3, 4, 4, 2]),
        (14336, [4, 8, 8, 8, 7]),
        (18944, [4, 4, 37, 8, 4]),
        (4864, [4, 4, 19, 4, 4]),
        (49152, [8, 8, 12, 8, 8]),
        (7, [1, 1, 7, 1, 1]),
        (1, [1, 1, 1]),
        (12, [12]),
    ],
)
def test_factors_of_known_dimensions(dimension, factors):
    """The first six are shapes the authors' group has used."""
    assert tensor_trains.factorise(dimension, len(factors)) == factors


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60_000), st.integers(1, 9))
def test_factors_multiply_to_the_dimension_and_fall_off_from_the_middle(dimension, cores):
    factors = tensor_trains.factorise(dimension, cores)
    assert len(factors) == cores
    assert math.prod(factors) == dimension
    assert factors == tensor_trains.factorise(dimension, cores)
    assert factors[cores // 2] == max(factors)
    assert factors[cores // 2 :] == sorted(factors[cores // 2 :], reverse=True)
    assert factors[: cores // 2] == sorted(factors[: cores // 2])


def test_bonds_are_cut_to_r_or_are_full():
    assert [s[3] for s in shapes_of(4096, 4096, 5, 16)] == [16, 16, 16, 16, 1]
    assert [s[3] for s in shapes_of(4096, 4096, 5, 32)] == [16, 32, 32, 16, 1]
    assert [s[3] for s in shapes_of(24, 40, 3)] == [4, 12, 1]  # pairs 4, 20, 12
    assert shapes_of(24, 40, 1) == [(1, 24, 40, 1)]


# TT-SVD, gauge, contraction

SIZES = [(24, 40), (96, 64), (1, 36), (37, 1), (7, 11), (64, 192)]


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("cores", [1, 2, 3, 5, 8])
def test_full_bonds_reconstruct_any_weight(m, n, cores):
    W = torch.randn(m, n)
    train = tensor_trains.decompose(W, shapes_of(m, n, cores))
    assert [tuple(core.shape) for core in train] == shapes_of(m, n, cores)
    assert distance(tensor_trains.contract(train), W) < 1e-5
    assert distance(tensor_trains.contract(tensor_trains.balance(train)), W) < 1e-5


def test_full_bonds_reconstruct_through_large_unfoldings():
    W = torch.randn(192, 576)
    assert (
        distance(tensor_trains.contract(tensor_trains.balance(tensor_trains.decompose(W, shapes_of(192, 576, 5)))), W)
        < 1e-5
    )


@pytest.mark.parametrize(("m", "n"), [(24, 40), (96, 64), (64, 192)])
@pytest.mark.parametrize("cores", [2, 3, 5])
@pytest.mark.parametrize("bond", [1, 3, 8])
@pytest.mark.parametrize("make", [torch.randn, decaying], ids=["flat", "decaying"])
def test_the_error_is_within_the_bound_of_tt_svd(m, n, cores, bond, make):
    W, shapes = make(m, n), shapes_of(m, n, cores, bond)
    train = tensor_trains.balance(tensor_trains.decompose(W, shapes))
    lost = tails(W, shapes)
    error = (tensor_trains.contract(train).double() - W.double()).norm().item()
    assert error <= math.hypot(*lost) * (1 + 1e-5)
    assert error >= max(lost) * (1 - 1e-5)  # no train with these bonds is nearer than its worst unfolding allows


def test_a_large_unfolding_is_cut_as_well_as_its_best_approximation(monkeypatch):
    """Beyond a short side of 1,024 the leading triplets come from a Krylov method."""
    W, shapes = torch.randn(64, 24) @ torch.randn(24, 96) + 0.01 * torch.randn(64, 96), shapes_of(64, 96, 2, 12)
    errors = []
    for small in (1024, 8):
        monkeypatch.setattr(tensor_trains, "SMALL", small)
        errors.append(distance(tensor_trains.contract(tensor_trains.decompose(W, shapes)), W))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("bond", [2, 8, 10**9])
@pytest.mark.parametrize("cores", [1, 2, 3, 5])
def test_the_gauge_changes_no_product_and_gives_cores_of_one_norm(bond, cores):
    W = decaying(64, 192, 40)
    train = tensor_trains.decompose(W, shapes_of(64, 192, cores, bond))
    balanced = tensor_trains.balance(train)
    assert distance(tensor_trains.contract(balanced), tensor_trains.contract(train)) < 1e-5
    norms = [core.norm().item() for core in balanced]
    assert max(norms) / min(norms) < 1 + 1e-3
    assert all(core.dtype == torch.float32 for core in balanced)


def test_every_core_but_the_last_of_a_decomposition_is_orthonormal():
    for core in tensor_trains.decompose(torch.randn(64, 192), shapes_of(64, 192, 5, 6))[:-1]:
        U = core.flatten(0, 2)
        torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1], dtype=U.dtype), atol=1e-10, rtol=0)


def test_the_two_sides_of_every_bond_carry_the_root_of_its_singular_values():
    W, shapes = torch.randn(24, 40), shapes_of(24, 40, 3, 4)
    train = [core.double() for core in tensor_trains.balance(tensor_trains.decompose(W, shapes))]
    A, rows = interleaved(tensor_trains.contract(train), shapes).contiguous(), 1
    for k in range(1, 3):
        rows *= shapes[k - 1][1] * shapes[k - 1][2]
        S = torch.linalg.svdvals(A.reshape(rows, -1))[: shapes[k - 1][3]]
        left, right = train[0].flatten(0, 2), train[-1].flatten(1)
        if k == 2:
            left = torch.tensordot(train[0], train[1], 1).flatten(0, 4)
        else:
            right = torch.tensordot(train[1], train[2], 1).flatten(1)
        for gram in (left.mT @ left, right @ right.mT):  # diagonal, and proportional to S
            share = gram.diagonal() / gram.trace()
            torch.testing.assert_close(share, S / S.sum(), rtol=1e-3, atol=1e-6)
            assert (gram - gram.diagonal().diag()).abs().max() < 1e-4 * gram.trace()


@pytest.mark.parametrize("cores", [1, 2, 3, 5])
def test_zero_and_rank_deficient_weights_give_no_nan(cores):
    for W in (torch.zeros(24, 40), torch.ones(24, 40), decaying(24, 40, 3), torch.eye(40)[:24]):
        train = tensor_trains.balance(tensor_trains.decompose(W, shapes_of(24, 40, cores)))
        assert all(core.isfinite().all() for core in train)
        product = tensor_trains.contract(train)
        assert (product - W).norm() <= 1e-5 * W.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    W = torch.randn(24, 40)
    W[3, 4] = value
    with pytest.raises(ValueError, match=r"24, 40.*NaN or infinite"):
        tensor_trains.decompose(W, shapes_of(24, 40, 3, 2))


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_tiny_and_huge_weights(factor):
    W = torch.randn(24, 40)
    got = tensor_trains.contract(tensor_trains.balance(tensor_trains.decompose(W * factor, shapes_of(24, 40, 3))))
    assert distance(got / factor, W) < 1e-5


def test_the_decomposition_is_the_same_under_autocast_and_repeatable():
    W = torch.randn(64, 192)
    plain = tensor_trains.balance(tensor_trains.decompose(W, shapes_of(64, 192, 3, 6)))
    with torch.autocast("cpu", torch.bfloat16):
        cast = tensor_trains.balance(tensor_trains.decompose(W, shapes_of(64, 192, 3, 6)))
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def random_train(shapes) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def element(train: list[Tensor], o: list[int], i: list[int]) -> float:
    """One entry by the definition: a product of N small matrices."""
    return torch.linalg.multi_dot([core[:, a, b] for core, a, b in zip(train, o, i, strict=True)]).item()


@pytest.mark.parametrize("shapes", [((2, 3, 2), (3, 1, 4)), ((4, 1), (1, 5)), ((1, 7, 1, 2), (2, 3, 1, 1))])
def test_contraction_entry_by_entry(shapes):
    rows, columns = (list(s) for s in shapes)
    train = random_train(tensor_trains.shapes(rows, columns, 3))
    D = tensor_trains.contract(train)
    assert D.shape == (math.prod(rows), math.prod(columns))
    for a, o in enumerate(itertools.product(*map(range, rows))):
        for b, i in enumerate(itertools.product(*map(range, columns))):
            assert D[a, b].item() == pytest.approx(element(train, o, i), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("cores", [1, 2, 3, 5])
def test_the_difference_of_two_trains(cores):
    shapes = shapes_of(24, 40, cores, 3)
    train, start = random_train(shapes), random_train(shapes)
    expected = 0.7 * (tensor_trains.contract(train) - tensor_trains.contract(start))
    torch.testing.assert_close(
        tensor_trains.contract(tensor_trains.difference(train, start, 0.7)), expected, rtol=1e-10, atol=1e-10
    )
    assert (tensor_trains.contract(tensor_trains.difference(train, [c.clone() for c in train])) == 0).all()


def test_the_difference_does_not_cancel():
    """Two bf16 trains a rounding step apart: subtracting their products leaves noise."""
    start = [c.bfloat16() for c in random_train(shapes_of(64, 64, 3, 4))]
    train = [c * (1 + 2**-7) for c in start]
    exact = tensor_trains.contract([c.double() for c in train]) - tensor_trains.contract([c.double() for c in start])
    assert distance(tensor_trains.contract(tensor_trains.difference(train, start)), exact) < 0.01
    assert distance(tensor_trains.contract(train) - tensor_trains.contract(start), exact) > 0.05


# DoTA


@large
@pytest.mark.parametrize(("m", "n"), [(24, 40), (96, 64)])
@pytest.mark.parametrize("init", ["mpo", "random"])
def test_the_random_start_has_the_norm_of_the_other(m, n, init):
    W = 3 * decaying(m, n)
    target = DoTA(bond=4, cores=3).delta(DoTA(bond=4, cores=3).start(W), W).norm().square().item()
    method = DoTA(bond=4, cores=3, init=init)
    draws = [method.start(W) for _ in range(400 if init == "random" else 1)]
    squares = [method.delta(p, W).norm().square().item() for p in draws]
    assert sum(squares) / len(squares) == pytest.approx(target, rel=0.15 if init == "random" else 1e-5)
    means = [sum(p[k].square().sum().item() for p in draws) / len(draws) for k in draws[0]]
    assert max(means) / min(means) < 1.15


@large
def test_bf16_weights_are_cut_in_full_precision():
    W = torch.randn(24, 40).bfloat16()
    p, q = DoTA(bond=99, cores=3).start(W), DoTA(bond=99, cores=3).start(W.float())
    assert all(p[k].dtype == torch.float32 and torch.equal(p[k], q[k]) for k in p)
    assert distance(DoTA().delta(p, W), W.float()) < 1e-5


@pytest.mark.parametrize("shape", [(49152, 576), (7, 49157), (1, 4096), (14336, 4096), (18944, 3584), (896, 4864)])
def test_awkward_shapes_on_meta(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there are only shapes here: nothing to warn of yet
        p = DoTA().start(torch.empty(shape, device="meta"))
    assert all(t.is_meta for t in p.values())
    assert math.prod(t.shape[1] for t in p.values()) == shape[0]
    assert math.prod(t.shape[2] for t in p.values()) == shape[1]
    assert DoTA().delta(p, torch.empty(0)).shape == shape


@large
@pytest.mark.parametrize("shape", [(4096, 36), (7, 211), (211, 7), (1, 96), (96, 1)])
def test_awkward_shapes_for_real(shape):
    W = torch.randn(shape)
    p, meta = DoTA(bond=4).start(W), DoTA(bond=4).start(W.to("meta"))
    assert [t.shape for t in p.values()] == [t.shape for t in meta.values()]
    assert all(t.isfinite().all() for t in p.values())
    lost = tails(W, [tuple(t.shape) for t in p.values()])
    assert (DoTA().delta(p, W) - W).norm() <= math.hypot(*lost) * (1 + 1e-5) + 1e-5 * W.norm()


def test_a_large_train_is_told_once_with_its_count():
    W = torch.randn(24, 40)
    with pytest.warns(UserWarning, match=r"24 × 40 weight holds 272 entries.*a tenth.*lower bond"):
        DoTA(bond=4, cores=2).start(W)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(210):
            DoTA(bond=4, cores=2).start(W)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DoTA(bond=4).start(torch.randn(192, 576))


@large
def test_factors_by_hand():
    W = torch.randn(24, 40)
    pair = DoTA(bond=2, cores=2, shapes=((3, 8), (10, 4)))
    assert [tuple(t.shape) for t in pair.start(W).values()] == [(1, 3, 10, 2), (2, 8, 4, 1)]
    assert pair == DoTA(bond=2, cores=2, shapes=[[3, 8], [10, 4]])
    assert hash(pair) == hash(DoTA(bond=2, cores=2, shapes=[[3, 8], [10, 4]]))
    mapping = DoTA(bond=2, cores=2, shapes={24: [3, 8], 40: (10, 4)})
    assert mapping == DoTA(bond=2, cores=2, shapes={"24": [3, 8], "40": [10, 4]})
    assert [t.shape for t in mapping.start(W).values()] == [t.shape for t in pair.start(W).values()]
    other = mapping.start(torch.randn(24, 36))  # a dimension that is not named is factorised as ever
    assert [tuple(t.shape) for t in other.values()] == [(1, 3, 6, 2), (2, 8, 6, 1)]
    with pytest.raises(ValueError, match=r"\[3, 8\] multiplies to 24, the weight has 25 there"):
        pair.start(torch.randn(25, 40))


class Closed:
    """A layer whose weight nobody may read."""

    weight = property(lambda self: pytest.fail("the weight was read"))

    def __init__(self, W: Tensor) -> None:
        self.W = W

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W)


@large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_only_x_by_reference_and_the_cores_are_kept_for_backward(dtype):
    W = torch.randn(64, 96)
    method = DoTA(bond=4)
    p0 = method.start(W)
    p = {k: nn.Parameter(1.1 * v) for k, v in p0.items()}
    x = torch.randn(32, 96, dtype=dtype, requires_grad=True)
    base, kept = Closed(W.to(dtype)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = method.apply(p, p0, x, base)
    allowed = {t.untyped_storage().data_ptr() for t in (x, base.W, *p.values())}
    assert {t.untyped_storage().data_ptr() for t in kept} <= allowed
    y.float().square().sum().backward()
    assert all(t.grad.abs().max() > 0 for t in p.values())


@large
def test_a_small_update_survives_bf16():
    """A relative step of 1e-3 added to a bf16 weight is mostly rounded away; formed in fp32 it is not."""
    W = (torch.randn(256, 256) / 16).bfloat16()
    method, x = DoTA(bond=16), torch.randn(64, 256).bfloat16()
    p0 = method.start(W.float())
    p = {k: v * (1 + 1e-3 * torch.randn_like(v)) for k, v in p0.items()}
    D = method.delta({k: v.double() for k, v in p.items()}, W) - method.delta({k: v.double() for k, v in p0.items()}, W)
    exact = F.linear(x.double(), D)
    ours = method.apply(p, p0, x, lambda x: 0)
    naive = F.linear(x.double(), (W + D.bfloat16()).double() - W.double())
    assert ours.dtype == torch.bfloat16
    assert distance(ours, exact) < 0.005
    assert distance(naive, exact) > 0.5


# A real weight


def test_the_share_of_a_real_weight_in_its_train(real_model):
    """2.4 to 3.7 % of the energy of an MLP weight at five cores and bond 16."""
    W = real_model.get_submodule("model.layers.15.mlp.gate_proj").weight.detach()
    p = DoTA().start(W)
    D = DoTA().delta(p, W)
    share = (D.norm() / W.norm()).square().item()
    assert 0.024 < share < 0.037
    assert share == pytest.approx(1 - distance(D, W) ** 2, abs=0.002)  # nearly a projection of W
    norms = [t.norm().item() for t in p.values()]
    assert max(norms) / min(norms) < 1 + 1e-3
