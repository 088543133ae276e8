"""Decompose a matrix into a tensor train: MPO(T1..TN)[o, i] = T1[o_1, i_1] T2[o_2, i_2] ... TN[o_N, i_N].

The rows m = Π o_k and the columns n = Π i_k are split into N factors each, and core T_k has the shape (d_{k-1}, o_k,
i_k, d_k) with d_0 = d_N = 1. The bond d_k is at most min(Π_{l<=k} o_l i_l, Π_{l>k} o_l i_l): there the train holds any
matrix exactly. A train is a list of its cores.

A matrix is decomposed from left to right (Oseledets 2011, "Tensor-Train Decomposition", theorem 2.2: the error is at
most the root of the sum of the squares of what the bonds truncate). A wide unfolding goes through its short side; its
Gram matrix is summed in fp64, so that nothing above the rounding of an fp32 weight is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inlay.numerics import linalg, ops

Train = list[Tensor]
Shape = tuple[int, int, int, int]
ByHand = list[list[int]] | dict[str, list[int]] | None  # factors of (rows, columns), or by dimension

SMALL = 1024  # short side up to which a full eigendecomposition is as fast as a few triplets
STRIP = 1 << 14  # columns of an unfolding in fp64 at a time
NOTHING = 1e-12  # a singular value this far below the largest is rounding


def factorise(dimension: int, cores: int) -> list[int]:
    """Factorise a dimension into as many factors as cores, as equal as its primes allow, the largest in the middle.

    Each prime, largest first, goes to the smallest factor so far; factors fall off from the middle, to the right first.
    """
    factors = [1] * cores
    for prime in reversed(_primes(dimension)):
        factors[factors.index(min(factors))] *= prime
    places = sorted(range(cores), key=lambda k: (abs(2 * k + 1 - cores), -k))
    return [factor for _, factor in sorted(zip(places, sorted(factors, reverse=True), strict=True))]


def _primes(number: int) -> list[int]:
    primes: list[int] = []
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            primes.append(divisor)
            number //= divisor
        divisor += 1
    return [*primes, number] if number > 1 else primes


def read_factors(owner: str, by_hand: object, cores: int) -> ByHand:
    """Check factors given by hand, and return them as JSON keeps them.

    Args:
        owner: the method, for messages.
        by_hand: [[o_1..o_N], [i_1..i_N]], {"dimension": factors}, or None.
        cores: N.

    Raises:
        ValueError: not of that form, not as many as there are cores, or not factors of their dimension.
    """
    if by_hand is None:
        return None
    if isinstance(by_hand, Mapping):
        if bad := [key for key in by_hand if not str(key).isdecimal() or int(key) < 1]:
            raise ValueError(f"{owner}: shapes={by_hand!r}: {bad[0]!r} is not a dimension; use whole numbers as keys")
        return {str(int(k)): _check_factors(owner, v, cores, int(k)) for k, v in by_hand.items()}
    if not isinstance(by_hand, (list, tuple)) or len(by_hand) != 2:
        raise ValueError(
            f"{owner}: shapes={by_hand!r} is neither a pair [[o_1..o_N], [i_1..i_N]] nor a mapping "
            "{dimension: factors}"
        )
    return [_check_factors(owner, factors, cores) for factors in by_hand]


def choose_factors(owner: str, by_hand: ByHand, cores: int, W: Tensor) -> tuple[list[int], list[int]]:
    """Return the factors of the rows and of the columns of W: those given by hand, else by `factorise`.

    Args:
        owner: the method, for messages.
        by_hand: as `read_factors` returns them.
        cores: N.
        W: the weight.

    Raises:
        ValueError: a given pair does not multiply to the shape of W.
    """
    out, inp = W.shape
    if isinstance(by_hand, list):
        return _check_factors(owner, by_hand[0], cores, out), _check_factors(owner, by_hand[1], cores, inp)
    factors = by_hand or {}
    rows, columns = (factors.get(str(d)) or factorise(d, cores) for d in (out, inp))
    return rows, columns


def _check_factors(owner: str, factors: object, cores: int, dimension: int | None = None) -> list[int]:
    if not isinstance(factors, (list, tuple)) or not all(type(f) is int and f >= 1 for f in factors):
        raise ValueError(f"{owner}: shapes: {factors!r} is not a list of whole numbers from 1 on")
    if len(factors) != cores:
        raise ValueError(
            f"{owner}: shapes: {list(factors)} has {len(factors)} factors for cores={cores}; "
            f"give {cores} factors (1 is one) or set cores={len(factors)}"
        )
    if dimension is not None and math.prod(factors) != dimension:
        raise ValueError(
            f"{owner}: shapes: {list(factors)} multiplies to {math.prod(factors)}, the weight has {dimension} there; "
            f"use for example {factorise(dimension, cores)}, or a mapping {{dimension: factors}} where weights differ"
        )
    return list(factors)


def shapes(rows: list[int], columns: list[int], bond: int) -> list[Shape]:
    """Return the shapes of the cores, with every bond min(bond, full bond)."""
    pairs = [o * i for o, i in zip(rows, columns, strict=True)]
    bonds = [min(bond, math.prod(pairs[:k]), math.prod(pairs[k:])) for k in range(len(pairs) + 1)]
    return list(zip(bonds, rows, columns, bonds[1:], strict=False))


@torch.no_grad()
def decompose(W: Tensor, cores: list[Shape]) -> Train:
    """Return the train of these shapes truncated from W (m × n): fp64, every core but the last orthonormal.

    So its norm is that of the last core. W may be zero or rank-deficient; the train is on its device.

    Raises:
        ValueError: W is not finite.
    """
    if not W.isfinite().all():
        raise ValueError(f"the weight of shape {tuple(W.shape)} has entries that are NaN or infinite")
    N = len(cores)
    rest = W.float().reshape([s[1] for s in cores] + [s[2] for s in cores])
    rest = rest.permute([axis for k in range(N) for axis in (k, N + k)]).reshape(1, -1)
    train = []
    for shape in cores[:-1]:
        rest = rest.reshape(math.prod(shape[:3]), -1)
        if shape[3] == len(rest):  # nothing is truncated here
            U = torch.eye(len(rest), dtype=torch.float64, device=W.device)
        else:
            U = _leading(rest, shape[3])
            rest = torch.cat([(U.mT @ strip.double()).float() for strip in rest.split(STRIP, 1)], 1)
        train.append(U.reshape(shape))
    return [*train, rest.reshape(cores[-1]).double()]


def _leading(A: Tensor, d: int) -> Tensor:
    """Return an orthonormal basis (rows × d), fp64, of the d leading left singular directions of A."""
    wide = A.shape[0] <= A.shape[1]
    if min(A.shape) > SMALL:
        U, _, _ = linalg.top_svd(A, d)
        return torch.linalg.qr(U.double()).Q
    gram = sum(strip.double() @ strip.double().mT for strip in (A if wide else A.mT).split(STRIP, 1))
    V = torch.linalg.eigh(gram).eigenvectors[:, -d:].flip(1)
    return V if wide else torch.linalg.qr(A.double() @ V).Q


@torch.no_grad()
def balance(train: Train) -> Train:
    """Return the train of the same matrix with balanced bonds and all cores of one norm, fp32.

    The root of each bond's singular values is on both sides. It takes what `decompose` returns. What a bond does not
    use (its singular value is zero) becomes zero on both sides.
    """
    train, scales = list(train), []
    for k in range(len(train) - 1, 0, -1):
        U, S, Vh = torch.linalg.svd(train[k].flatten(1), full_matrices=False)
        train[k], train[k - 1] = Vh.view_as(train[k]), train[k - 1] @ (U * S)
        used = S[0] * NOTHING < S
        scales.append((torch.where(used, S, 0).sqrt(), torch.where(used, S, torch.inf).rsqrt()))
    for k, (root, inverse) in enumerate(reversed(scales)):
        train[k] = train[k] * inverse
        train[k + 1] = root[:, None, None, None] * train[k + 1]
    norms = torch.stack([core.norm() for core in train])
    if norms.min() > 0:
        factors = norms.log().mean().exp() / norms
        train = [core * factor for core, factor in zip(train, factors, strict=True)]
    return [core.float() for core in train]


def gaussian(train: Train) -> Train:
    """Return Gaussian cores of the shapes of a decomposed train, from the global generator, fp32.

    Each core has the same expected squared norm, and the product that of the train.
    """
    # E ‖product‖² = Π_k E ‖T_k‖² / Π_k d_k, as each bond is summed over d_k independent terms.
    square = train[-1].square().sum() * math.prod(core.shape[3] for core in train)
    each = square ** (1 / len(train))
    return [torch.randn(c.shape, device=c.device) * (each / c.numel()).sqrt().float() for c in train]


def middle(train: Sequence[Tensor]) -> int:
    """Return how many cores belong to the left half of a train, for `halves`, so that both halves are small."""
    sizes = [core.shape[1] * core.shape[2] for core in train]
    smaller = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(train) + 1)]
    return smaller.index(max(smaller))


def halves(train: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Contract a train from both ends to the bond in its middle: (o, i, d) and (d, o', i')."""
    left, right = train[0].new_ones(1, 1, 1), train[0].new_ones(1, 1, 1)
    k = middle(train)
    for core in train[:k]:
        left = torch.tensordot(left, core, 1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    for core in reversed(train[k:]):
        right = torch.tensordot(core, right, 1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return left, right


def rows(i: int, j: int, left: Tensor, right: Tensor) -> Tensor:
    """Return rows i to j, multiples of o', of the matrix (o o' × i i') that two halves stand for."""
    part = left[i // right.shape[1] : j // right.shape[1]]
    if part.dtype != torch.float64 and (kernels := ops.fused(part, right)) is not None:
        return kernels.train_rows(part, right)
    # Rows and columns are ordered on the two halves, which are small; the product is transposed only once.
    return torch.tensordot(part, right, 1).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def contract(train: Sequence[Tensor]) -> Tensor:
    """Return the matrix (Π o_k × Π i_k) of a train, differentiable."""
    left, right = halves(train)
    return rows(0, len(left) * right.shape[1], left, right)


def difference(train: Sequence[Tensor], start: Sequence[Tensor] | None, factor: float = 1.0) -> Train:
    """Return the train of factor (train − start), exactly zero for equal trains; without a start, of the train.

    Nothing large cancels. Σ_k S_1..S_{k-1} (T_k − S_k) T_{k+1}..T_N is itself a train of twice the bonds, with the
    cores [[S, T − S], [0, T]].
    """
    if start is None:
        return [factor * train[0], *train[1:]]
    first, *others = (torch.cat([S, T - S], 3) for T, S in zip(train, start, strict=True))
    blocks = [factor * first]
    for upper, T in zip(others, train[1:], strict=True):
        blocks.append(torch.cat([upper, torch.cat([torch.zeros_like(T), T], 3)]))
    blocks[-1] = blocks[-1][..., 1:]
    return blocks
