"""Decide, without any run, which rates continue, and which points form a Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def rungs(rates: int, steps: int, factor: int) -> list[tuple[int, int]]:
    """Return the rungs of successive halving: how many rates run, and for how many steps each.

    Jamieson and Talwalkar 2016. Rates are divided by `factor` until one is left for the last rung, which has all
    `steps`.
    """
    counts = [rates]
    while counts[-1] > 1:
        counts.append(math.ceil(counts[-1] / factor))
    last = len(counts) - 1
    return [(count, max(1, round(steps / factor ** (last - i)))) for i, count in enumerate(counts)]


def survivors(losses: Mapping[float, float], count: int, noise: Mapping[float, float] | None = None) -> list[float]:
    """Return the `count` rates with the lowest losses, the smaller of equal ones; never one that diverged.

    Args:
        losses: by rate.
        count: how many rates go on, where their losses differ by more than noise.
        noise: by rate, how far its loss may lie above the lowest by chance; such a rate goes on too.
    """
    ranked = sorted((loss, rate) for rate, loss in losses.items() if math.isfinite(loss))
    chance = noise or {}
    return [r for n, (loss, r) in enumerate(ranked) if n < count or loss - ranked[0][0] <= chance.get(r, -1.0)]


def row_noise(rows: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """Return the standard error of the difference of two mean losses over the tokens of the same examples.

    Args:
        rows: of one run, each example's token count and summed loss.
        others: of the other run; the counts are the same.
    """
    tokens = sum(row[0] for row in rows)
    gaps = [(a[0], a[1] - b[1]) for a, b in zip(rows, others, strict=True)]
    mean = sum(gap for _, gap in gaps) / tokens
    return math.sqrt(sum((gap - mean * count) ** 2 for count, gap in gaps) * len(gaps) / max(1, len(gaps) - 1)) / tokens


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which points are on the Pareto front: no other one is lower in one value and not higher in the other."""
    return [not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points) for p in points]
