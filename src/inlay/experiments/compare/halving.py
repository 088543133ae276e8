"""The decisions of a comparison, without any run: which rates go on, what differs beyond noise, what nothing beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def rungs(rates: int, steps: int, factor: int) -> list[tuple[int, int]]:
    """Successive halving (Jamieson and Talwalkar 2016): how many rates run, and for how many of all steps, until one
    is left for the last rung, which has all of them."""
    counts = [rates]
    while counts[-1] > 1:
        counts.append(math.ceil(counts[-1] / factor))
    last = len(counts) - 1
    return [(count, max(1, round(steps / factor ** (last - i)))) for i, count in enumerate(counts)]


def survivors(losses: Mapping[float, float], count: int) -> list[float]:
    """The `count` rates with the least loss, of equal ones the smaller; one that diverged is never among them."""
    finite = [rate for rate in losses if math.isfinite(losses[rate])]
    return sorted(finite, key=lambda rate: (losses[rate], rate))[:count]


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (less is better in both) no other one beats: is as good in both and better in one."""
    return [not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points) for p in points]
