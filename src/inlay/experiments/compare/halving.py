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


def survivors(losses: Mapping[float, float], count: int) -> list[float]:
    """Return the `count` rates with the lowest losses, the smaller of equal ones; never one that diverged."""
    finite = [rate for rate in losses if math.isfinite(losses[rate])]
    return sorted(finite, key=lambda rate: (losses[rate], rate))[:count]


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which points are on the Pareto front: no other one is lower in one value and not higher in the other."""
    return [not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points) for p in points]
