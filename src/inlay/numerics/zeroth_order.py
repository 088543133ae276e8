"""Estimate gradients without a backward pass, from the losses on both sides of θ along random directions.

    ĝ = (L(θ + ε Z) − L(θ − ε Z)) / 2ε · Z

MeZO (Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333): Z is Gaussian, so
that E[ĝ] = ∇L up to ε². SubZero (Yu et al. 2024, "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces", arXiv
2410.08989): for a matrix (m × n), Z = √(mn)/r U C Vᵀ with Gaussian C (r × r) and orthonormal U (m × r), V (n × r) that
are drawn again every `renew` steps; Z is as long as MeZO's, and E[ĝ] = mn/r² UUᵀ ∇L VVᵀ, which is ∇L in the mean over U
and V. Thin factors are first reshaped to be nearly square, as the paper does; [ours]: so are tensors of any other
number of dimensions, and what is then narrower than r gets MeZO's Z.

Nothing is kept for a backward pass, and no Z is stored: each comes from a seed when it is needed. θ is restored from a
copy, since θ + εZ − 2εZ + εZ is not θ in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inlay.numerics.ops import seed_of

Together = Callable[["ZerothOrder", Sequence[Tensor], Sequence[Tensor], int], AbstractContextManager[None]]


@dataclass(kw_only=True)
class ZerothOrder:
    """Estimate gradients, without any state but what follows from `seed` and the number of the step."""

    epsilon: float = 1e-3
    queries: int = 1  # directions per step, with two losses each; ĝ is their mean
    batched: bool = False  # all of them in one pass of the layers (`host.batched_queries`)
    rank: int | None = None  # r; None: MeZO
    renew: int = 1000  # steps between new U and V
    seed: int = 0
    held: tuple[Any, list[tuple[Tensor, Tensor] | None]] = field(default=(None, []), init=False, repr=False)  # U, V

    def __post_init__(self) -> None:
        for name in ("epsilon", "queries", "rank", "renew"):
            value = vars(self)[name]
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} is not above 0")

    @property
    def sides(self) -> list[tuple[int, int]]:
        """Return the (query, sign) of a step's losses, in the order of their evaluation."""
        return [(query, sign) for query in range(self.queries) for sign in (1, -1)]

    @torch.no_grad()
    def estimate(
        self, loss: Callable[[], Tensor], parameters: Sequence[Tensor], step: int, together: Together | None = None
    ) -> Tensor:
        """Add ĝ to the `.grad` of the parameters, which keep their values, and return the mean of the losses.

        Args:
            loss: a forward pass that returns a scalar; what it draws (dropout) is the same on both sides.
            parameters: θ, of which `.grad` is set.
            step: the number of the optimiser step: each step has its own Z.
            together: a context in which the k-th loss is at the k-th of `sides`, whatever θ is:
                `host.batched_queries.spread_queries`.
        """
        parameters = list(parameters)
        starts = [p.detach().clone() for p in parameters]
        values: list[Tensor] = []
        devices = sorted({p.get_device() for p in parameters if p.is_cuda})
        with together(self, parameters, starts, step) if together else nullcontext():
            try:
                for query, sign in self.sides:
                    if together is None:
                        for p, start, Z in zip(parameters, starts, self.directions(starts, step, query), strict=True):
                            torch.add(start, Z, alpha=sign * self.epsilon, out=p.data)
                    with torch.random.fork_rng(devices):
                        torch.manual_seed(seed_of(self.seed, step, query, "loss"))
                        value = loss()
                    values.append(value.to(torch.promote_types(value.dtype, torch.float32)))
            finally:
                for p, start in zip(parameters, starts, strict=True):
                    p.copy_(start)
        losses = torch.stack(values).view(-1, 2)
        slopes = (losses[:, 0] - losses[:, 1]) / (2 * self.epsilon * self.queries)
        for query, slope in enumerate(slopes):
            for p, Z in zip(parameters, self.directions(starts, step, query), strict=True):
                p.grad = Z.mul_(slope) if p.grad is None else p.grad.addcmul_(Z, slope.to(Z.dtype))
        return losses.mean()

    def directions(self, tensors: Sequence[Tensor], step: int, query: int) -> Iterator[Tensor]:
        """Yield Z of one query, tensor by tensor."""
        for i, (t, basis) in enumerate(zip(tensors, self.bases(tensors, step), strict=True)):
            yield self.direction(i, t, basis, step, query)

    def direction(self, i: int, t: Tensor, basis: tuple[Tensor, Tensor] | None, step: int, query: int) -> Tensor:
        """Return Z of the i-th tensor, for the (U, V) that `bases` returned."""
        generator = torch.Generator(t.device).manual_seed(seed_of(self.seed, step, query, i))
        if basis is None:
            return torch.empty_like(t).normal_(generator=generator)
        U, V = basis
        C = torch.empty(U.shape[1], V.shape[1], device=t.device).normal_(generator=generator)
        return (math.sqrt(t.numel()) / len(C) * U @ C @ V.T).view(t.shape).to(t.dtype)

    def bases(self, tensors: Sequence[Tensor], step: int) -> list[tuple[Tensor, Tensor] | None]:
        """Return (U, V) of each tensor; None where all entries of Z are Gaussian."""
        period, shapes = step // self.renew, [t.shape for t in tensors]
        if self.held[0] != (period, shapes):
            bases = [self._basis(t, seed_of(self.seed, period, i, "basis")) for i, t in enumerate(tensors)]
            self.held = (period, shapes), bases
        return self.held[1]

    def _basis(self, t: Tensor, seed: int) -> tuple[Tensor, Tensor] | None:
        m = nearly_square(t.numel())
        if self.rank is None or m <= self.rank:
            return None
        generator = torch.Generator(t.device).manual_seed(seed)
        U, V = (
            torch.linalg.qr(torch.empty(n, self.rank, device=t.device).normal_(generator=generator))[0]
            for n in (m, t.numel() // m)
        )
        return U, V


def nearly_square(numel: int) -> int:
    """Return the largest divisor of `numel` up to its root."""
    return next(m for m in range(math.isqrt(numel), 0, -1) if numel % m == 0)
