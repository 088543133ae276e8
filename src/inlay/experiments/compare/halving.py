"""The decisions of a comparison, without any run: which rates go on, what differs beyond noise, what nothing beats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its confidence interval, which one pair does not give (NaN), nor pairs that
    all differ by the same."""

    mean: float
    low: float
    high: float

    def shown(self) -> str:
        """As text; empty where there is no difference."""
        interval = "" if math.isnan(self.low) else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return "" if math.isnan(self.mean) else f"{self.mean:+.3f}{interval}"

    def verdict(self, reference: str, below: str = "better", above: str = "worse") -> str:
        """In words: of losses, less is better."""
        if math.isnan(self.mean):
            return "no comparison: a run failed or diverged"
        if math.isnan(self.low):
            return "noise is not known: one seed, or all differ by the same"
        if self.low <= 0 <= self.high:
            return "no difference beyond noise"
        return f"{below if self.high < 0 else above} than {reference} by {abs(self.mean):.3f}"


def paired(values: Sequence[float], reference: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Values minus those of the reference at the same seeds (all NaN if that has none): mean ± t s / √n, Student's t
    with n - 1 degrees of freedom."""
    differences = [a - b for a, b in zip(values, reference, strict=True)] if reference else []
    if not differences or not all(map(math.isfinite, differences)):
        return Difference(math.nan, math.nan, math.nan)
    mean, spread = statistics.fmean(differences), statistics.pstdev(differences)
    if len(differences) == 1 or (mean and spread <= 1e-9 * abs(mean)):  # a spread of 0 is no sign of certainty
        return Difference(mean, math.nan, math.nan)
    from scipy.stats import t  # half a second

    n = len(differences)
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half)


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
