"""Compute a few singular triplets of a weight, from either end of its spectrum, without a full decomposition.

The top r come from block Golub-Kahan-Lanczos with full reorthogonalisation (Golub, Luk and Overton 1981). The minor r
come from the same iteration on the inverse, W⁻¹ = V Σ⁻¹ Uᵀ, whose top triplets they are; one LU factorisation applies
it and its adjoint. A rectangular W goes through its short-side Gram matrix while its condition number allows, else
through a QR of its long side. A Gram matrix of a square W, or "W minus its top", would lose the minor triplets to
rounding. Every answer is checked against W, and replaced by a full SVD if it fails: this happens for the minor side of
most singular weights (pruned ones, with rows of zeros), and for the top r of a weight whose rank is below r.

The aim on each side: the subspace to a sine of 1e-3 where the singular values on either side of the cut differ by more
than 1 %, otherwise (real spectra are dense) its energy Σσ² to 1e-3. Rounding limits both as it does a full SVD in fp32:
σ is known to about 1e-6 ‖W‖, the sine to about that over the gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["top", "minor", "middle", "random"]
Triplets = tuple[Tensor, Tensor, Tensor]
Map = Callable[[Tensor], Tensor]

SEED = 0  # of a generator of this file's own: the same W gives the same factors whatever the global seed
SMALL = 384  # a full SVD is as fast up to this short side, and for more than a twelfth of the triplets
BLOCK = 16  # vectors in a Krylov block; more would reach the same accuracy with a larger basis
BASIS = 640  # least number of Krylov vectors after which to stop
ANGLE = 3e-4  # error bound on the sine to reach where there is a gap
GAP = 0.01  # relative gap below which only energy is meaningful
ENERGY = 1e-3  # error bound on the relative energy
TINY = 1e-7  # least pivot of an LU factorisation of a matrix with entries up to 1
ROUNDING = 1e-6  # error of fp32 products of W with a unit vector, relative to the Frobenius norm ‖W‖


class Route(NamedTuple):
    """Hold what a route found: k > r triplets of A (m, n), to know the gap at r, and a test for better ones."""

    U: Tensor  # (m, k)
    S: Tensor  # (k,), descending
    V: Tensor  # (n, k)
    step: Map  # (n, p) -> (n, p), a step of power iteration on the right side towards the wanted end


def svd(W: Tensor, r: int, side: Side, skip: int | None = None) -> Triplets:
    """Return r singular triplets of W (m, n) from one side of its spectrum: U (m, r), S (r,) descending, Vh (r, n).

    They are fp32, on W's device, and repeatable, but for what "random" draws; the entry of largest magnitude in each
    column of U is positive. A W on the meta device gives meta tensors of the right shapes.

    Args:
        W: the weight.
        r: how many triplets.
        side: "top" and "minor" are fast. "middle" (centred in the spectrum) and "random" (drawn from torch's
            generator) are ablations of MiLoRA and take a full SVD.
        skip: with "middle", how many larger triplets to leave out, instead of the same number on both sides.

    Raises:
        ValueError: an unknown side, a `skip` that leaves less than r triplets or is of another side, r outside
            [1, min(m, n)], or a W that is not a finite matrix.
    """
    _check_arguments(W, r, side, skip)
    if W.is_meta:
        new = W.to(torch.float32).new_empty
        return new(W.shape[0], r), new(r), new(r, W.shape[1])
    with full_precision(W.device):
        A, scale = _scaled(W)
        if W.shape[0] >= W.shape[1]:
            U, S, V = _tall_svd(A, r, side, skip)
        else:
            V, S, U = _tall_svd(A.mT, r, side, skip)
        sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        return U * sign, S * scale, (V * sign).mT.contiguous()


def top_svd(W: Tensor, r: int) -> Triplets:
    """Return the r largest triplets of W (m, n): U (m, r), S (r,) descending, Vh (r, n). See `svd`."""
    return svd(W, r, "top")


def sketched_svd(W: Tensor, r: int, rounds: int = 3) -> Triplets:
    """Return about the r largest triplets of W (m, n), as `top_svd`, at a fixed low cost: block power iteration.

    This is for a W that is itself an estimate. Directions whose singular values are near the r-th are the least exact,
    so request more than are needed. Repeatable: it starts from `uniform_noise`.
    """
    width = min(r + 8, *W.shape)
    with full_precision(W.device):
        A, scale = _scaled(W)
        Q = uniform_noise(A.shape[1], width, 0, A.dtype, A.device)
        for _ in range(rounds):
            Q = torch.linalg.qr(A.mT @ torch.linalg.qr(A @ Q).Q).Q
        U, S, Vh = torch.linalg.svd(A @ Q, full_matrices=False)
        return U[:, :r], S[:r] * scale, (Vh @ Q.mT)[:r]


def add_to_svd(parts: Mapping[str, Tensor], G: Tensor, r: int) -> dict[str, Tensor]:
    """Return U (m, r), S (r,) and V (r, n) of about the r largest triplets of a sum, with one more term G (m, n).

    Args:
        parts: what this returned for the terms before; empty before the first.
        G: the term, of which nothing else is kept.
        r: how many triplets.
    """
    total = (parts["U"] * parts["S"]) @ parts["V"] + G if parts else G
    return dict(zip("USV", sketched_svd(total, r), strict=True))


def compress(B: Tensor, A: Tensor) -> Triplets:
    """Return the singular triplets of B A: U (m, t), S (t,) descending, Vh (t, n), t its rank.

    B is (m, k), A (k, n), k small. By QR of both factors and the SVD of a k × k matrix, in fp64: B A, (m, n), is never
    formed.
    """
    with torch.no_grad():
        Q, R = torch.linalg.qr(B.double())
        P, L = torch.linalg.qr(A.double().mT)
        U, S, Vh = torch.linalg.svd(R @ L.mT)
        t = max(1, int((1e-14 * S[0] < S).sum()))
        return Q @ U[:, :t], S[:t], Vh[:t] @ P.mT


def qr(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the first r columns Q (m, r) and rows R (r, n) of the thin factorisation W = Q R, fp32, on W's device.

    Householder's Q_r depends on the first r columns of W alone, and R_r is Q_rᵀ W: the rest is never computed.
    """
    if W.is_meta:
        return W.new_empty(W.shape[0], r, dtype=torch.float32), W.new_empty(r, W.shape[1], dtype=torch.float32)
    _check_finite(W)
    with full_precision(W.device):
        Q = torch.linalg.qr(W[:, :r].double()).Q.float()
        return Q, (Q.mT @ W.float()).triu()


def ldu(W: Tensor, r: int) -> Triplets:
    """Return P L (m, r), the diagonal d (r,) and U (r, n), the first r columns and rows of W = P L diag(d) U, fp32.

    Rows are pivoted, L and U have unit diagonals. Only the first r columns of W decide on pivots and L; U follows by
    substitution. A row whose pivot is rounding (W's first columns depend on each other) is left undivided, with d ≈ 0.
    """
    if W.is_meta:
        new = W.to(torch.float32).new_empty
        return new(W.shape[0], r), new(r), new(r, W.shape[1])
    _check_finite(W)
    with full_precision(W.device):
        LU, pivots, _ = torch.linalg.lu_factor_ex(W[:, :r].double())
        order = list(range(len(W)))
        for i, j in enumerate(pivots.tolist()):
            order[i], order[j - 1] = order[j - 1], order[i]
        L = LU.tril(-1) + torch.eye(*LU.shape, dtype=LU.dtype, device=W.device)
        U = torch.linalg.solve_triangular(L[:r], W[order[:r]].double(), upper=False, unitriangular=True)
        d = U.diagonal()
        used = d.abs() > ROUNDING * W.abs().max()
        U = U / torch.where(used, d, 1)[:, None]
        return L[torch.tensor(order).argsort().to(W.device)].float(), d.float(), U.float()


def uniform_noise(rows: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random numbers (rows, columns), uniform with variance 1, by the seed, on every machine and release.

    The result is cached, so never write to it. The numbers come from splitmix64 (Steele, Lea and Flood 2014), which is
    integer arithmetic; torch promises its own generators for one release only.
    """
    key = rows, columns, seed, dtype, device
    if key not in _NOISE:  # functools.cache is not traced by torch.compile
        with torch.inference_mode(False):  # a training may use it next
            _NOISE[key] = _splitmix(rows * columns, seed, device).to(dtype).view(rows, columns)
    return _NOISE[key]


_NOISE: dict[tuple[int, int, int, torch.dtype, torch.device], Tensor] = {}


def _splitmix(count: int, seed: int, device: torch.device) -> Tensor:
    z = (torch.arange(1, count + 1, device=device) + (seed << 40)) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return (2 * (z >> 40 & 0xFFFFFF) - 0xFFFFFF).float() / 0x1000000 * math.sqrt(3)


def _signed(word: int) -> int:
    """Return the 64 bits of `word` as torch's signed integers read them."""
    return word - (1 << 64) if word >> 63 else word


def _check_finite(W: Tensor) -> None:
    if not W.isfinite().all():
        raise ValueError(f"the weight of shape {tuple(W.shape)} has entries that are NaN or infinite")


def _check_arguments(W: Tensor, r: int, side: str, skip: int | None) -> None:
    if side not in ("top", "minor", "middle", "random"):
        raise ValueError(f"side must be 'top', 'minor', 'middle' or 'random', not {side!r}")
    if W.ndim != 2:
        raise ValueError(f"the weight must be a matrix, not of {W.ndim} dimensions (shape {tuple(W.shape)})")
    if not 1 <= r <= min(W.shape):
        raise ValueError(f"rank r={r} does not fit a weight of shape {tuple(W.shape)}: 1 <= r <= {min(W.shape)}")
    if skip is not None and (side != "middle" or not 0 <= skip <= min(W.shape) - r):
        raise ValueError(f"skip={skip} is for the middle side alone, and 0 <= skip <= {min(W.shape) - r} here")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn off gradients, and keep fp32 products in fp32: training often allows TF32 or bf16, which have 3 digits."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _scaled(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return W / max|W| in fp32, and max|W| (1 for zeros), so that squares neither overflow nor vanish."""
    A = W if W.dtype == torch.float64 else W.float()
    low, high = A.aminmax()
    scale = torch.maximum(-low, high)
    if not scale.isfinite():
        _check_finite(W)
    scale = torch.where(scale > 0, scale, 1)
    return (A / scale).float(), scale.float()


def _tall_svd(A: Tensor, r: int, side: str, skip: int | None) -> Triplets:
    """Return the triplets of `svd` for a finite fp32 A (m, n), m >= n: U (m, r), S (r,), V (n, r), of any sign."""
    n = A.shape[1]
    if side in ("top", "minor") and n > SMALL and n >= 12 * r:
        wanted, routes = (slice(r), _top(A, r)) if side == "top" else (slice(-r, None), _minor(A, r))
        with suppress(torch.linalg.LinAlgError):  # pyright: ignore (the inverse of a singular A may overflow)
            for route in routes:
                if _is_right(A, route, wanted):
                    return route.U[:, wanted], route.S[wanted], route.V[:, wanted]
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    chosen = _indices(n, r, side, skip).to(A.device)
    return U[:, chosen], S[chosen], Vh[chosen].mT


def _indices(n: int, r: int, side: str, skip: int | None) -> Tensor:
    if side == "random":
        return torch.randperm(n, device="cpu")[:r].sort().values
    start = {"top": 0, "middle": (n - r) // 2 if skip is None else skip, "minor": n - r}[side]
    return torch.arange(start, start + r)


def _top(A: Tensor, r: int) -> Iterator[Route]:
    U, S, V = _krylov(lambda X: _times(A, X), lambda Y: _times(A.mT, Y), A, r)
    yield Route(U, S, V, lambda X: _times(A.mT, _times(A, X)))


def _minor(A: Tensor, r: int) -> Iterator[Route]:
    if A.shape[0] > A.shape[1]:
        yield _minor_of_gram(A, r)
        Q, R = torch.linalg.qr(A)
        route = _minor_of_square(R, r)
        yield route._replace(U=Q @ route.U)
    else:
        yield _minor_of_square(A, r)


def _minor_of_gram(A: Tensor, r: int) -> Route:
    """Find the minor triplets by inverse iteration on AᵀA, which is exact enough for (σ_max / σ_min)² far below 1e7."""
    solve, _ = _inverse(_gram(A))
    _, _, V = _krylov(solve, solve, A[: A.shape[1]], r)
    V = torch.linalg.qr(solve(V)).Q  # damps the basis's errors along the top of the spectrum, magnified by σ_max / σ
    U, R = torch.linalg.qr(_times(A, V).double())
    u, S, vh = torch.linalg.svd(R)
    return Route((U @ u).float(), S.float(), V @ vh.mT.float(), solve)


def _minor_of_square(A: Tensor, r: int) -> Route:
    """Find the minor triplets by two-sided inverse iteration.

    U is never taken as A v / σ, which magnifies the rounding of v by σ_max / σ.
    """
    solve, solve_adjoint = _inverse(A)
    V, _, U = _krylov(solve, solve_adjoint, A, r)
    # The basis holds the rounding of many solves; after one plain round only that of the last remains.
    U, V = torch.linalg.qr(solve_adjoint(V)).Q, torch.linalg.qr(solve(U)).Q
    u, S, vh = torch.linalg.svd((U.mT @ _times(A, V)).double())
    return Route(U @ u.float(), S.float(), V @ vh.mT.float(), lambda X: solve(solve_adjoint(X)))


def _inverse(A: Tensor) -> tuple[Map, Map]:
    """Return X -> A⁻¹ X and X -> A⁻ᵀ X for a square A, which may be singular: pivots are kept off zero."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(A.mT)  # a row-major A is Aᵀ to LAPACK: a third faster
    pivot = LU.diagonal()
    pivot[pivot.abs() < TINY] = TINY
    return lambda X: torch.linalg.lu_solve(LU, pivots, X, adjoint=True), lambda X: torch.linalg.lu_solve(LU, pivots, X)


def _gram(A: Tensor, width: int = 1024) -> Tensor:
    """Return AᵀA (n, n), computing only the half below the diagonal."""
    G = A.new_empty(A.shape[1], A.shape[1])
    for i in range(0, A.shape[1], width):
        block = A[:, i : i + width].mT @ A[:, : i + width]
        G[i : i + width, : i + width] = block
        G[: i + width, i : i + width] = block.mT
    return G


def _times(A: Tensor, X: Tensor) -> Tensor:
    """Return A X for a narrow X: a BLAS is up to 3 times faster when the large operand is row-major."""
    return A @ X if A.is_contiguous() else (X.mT @ A.mT).mT


def _normal(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return Gaussian numbers drawn on the CPU, so that every device starts from the same ones."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(SEED), device="cpu").to(like)


def _krylov(forward: Map, adjoint: Map, like: Tensor, r: int) -> Triplets:
    """Return the k = r + block largest triplets of an operator with the shape (m, n) of `like`: U, S, V (n, k).

    Bases U, V with forward(V) = U B and adjoint(U) = V Bᵀ + (new block) C grow by a block at a time until the triplets
    of the small B are triplets of the operator.
    """
    (m, n), b = like.shape, BLOCK
    limit = min(n - b, max(BASIS, 8 * r)) // b * b
    U = like.new_empty(m, limit)
    V = like.new_empty(n, limit + b)
    B = like.new_zeros(limit, limit)
    V[:, :b] = torch.linalg.qr(_normal(n, b, like)).Q
    k = 0
    due = r + 4 * b
    last = (0, 0.0)
    while True:
        old, new = slice(k), slice(k, k + b)
        k += b
        U[:, new], B[:k, new] = _extend(U[:, old], forward(V[:, new]))
        V[:, k : k + b], C = _extend(V[:, :k], adjoint(U[:, new]))
        if k >= due or k == limit:
            Y, S, X, excess = _ritz(B[:k, :k], C[-b:], r)
            if excess <= 1 or k == limit:
                return U[:, :k] @ Y[:, : r + b].to(U), S[: r + b].to(U), V[:, :k] @ X[:, : r + b].to(V)
            due, last = _next_check(k, excess, *last, b), (k, excess)


def _extend(basis: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q (m, b), orthonormal and orthogonal to basis (m, k), and the coefficients (k + b, b) of X in [basis, Q].

    Orthogonalising twice is enough (Kahan and Parlett). An X that lies in the basis leaves rounding, from which new
    directions grow.
    """
    first = basis.mT @ X
    Q, R = torch.linalg.qr(X - basis @ first)
    second = basis.mT @ Q
    Q, R2 = torch.linalg.qr(Q - basis @ second)
    return Q, torch.cat((first + second @ R, R2 @ R))


def _ritz(B: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the SVD of B (k, k) as Y, S, X, and the residual of its top r triplets over the acceptable one."""
    Y, S, Xh = torch.linalg.svd(B.cpu().double())
    residual = torch.linalg.matrix_norm(C.cpu().double() @ Y[-len(C) :, :r])
    edge, gap = S[r - 1], S[r - 1] - S[r]
    return Y, S, Xh.mT, float(residual / (ANGLE * gap if gap > GAP * edge else ENERGY * edge))


def _next_check(k: int, excess: float, last_k: int, last_excess: float, b: int) -> float:
    """Return the basis size at which to check again: the residual falls geometrically, or a little faster."""
    if not 1 < excess < last_excess:
        return k + 2 * b
    more = 0.9 * (k - last_k) * math.log(excess) / math.log(last_excess / excess)
    return k + min(more, k)


def _is_right(A: Tensor, route: Route, wanted: slice) -> bool:
    """Return whether the wanted triplets are orthonormal, satisfy A V = U S and Aᵀ U = V S, and are extreme."""
    U = route.U[:, wanted]
    S = route.S[wanted]
    V = route.V[:, wanted]
    top = wanted.start is None
    edge, beyond = (S[-1], route.S[len(S)]) if top else (S[0], route.S[-len(S) - 1])
    gap = (edge - beyond).abs()
    rounding = ROUNDING * torch.linalg.matrix_norm(A)
    residual = torch.cat((_times(A, V) - U * S, _times(A.mT, U) - V * S)).norm(dim=0).sub(rounding).clamp(min=0)
    # Written so that NaN fails.
    right = _skew(U) <= 1e-5 and _skew(V) <= 1e-5 and (S * residual).sum() <= ENERGY * S.square().sum()
    if not right or (gap > GAP * edge and residual.norm() > 3 * ANGLE * gap):
        return False
    best = _best_elsewhere(A, route.step, V, top)
    return bool(best <= edge * (1 + GAP) + rounding if top else best >= edge * (1 - GAP) - rounding)


def _skew(U: Tensor) -> Tensor:
    return (U.mT @ U - torch.eye(U.shape[1], device=U.device)).abs().amax()


def _best_elsewhere(A: Tensor, step: Map, V: Tensor, top: bool) -> Tensor:
    """Return the most extreme ‖A x‖ that two rounds of power iteration find among unit x orthogonal to V."""
    X = _normal(V.shape[0], 8, V)
    for _ in range(2):
        X = step(torch.linalg.qr(X - V @ (V.mT @ X)).Q)
    S = torch.linalg.svdvals(_times(A, torch.linalg.qr(X - V @ (V.mT @ X)).Q))
    return S[0] if top else S[-1]
