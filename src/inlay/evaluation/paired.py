"""Paired differences and their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Hold the mean of paired differences and its confidence interval.

    The interval is NaN for a single pair, and for pairs that all differ by the same.
    """

    mean: float
    low: float
    high: float

    def shown(self) -> str:
        """Return the difference as text; empty where there is none."""
        interval = "" if math.isnan(self.low) else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return "" if math.isnan(self.mean) else f"{self.mean:+.3f}{interval}"

    def verdict(self, reference: str, below: str = "better", above: str = "worse") -> str:
        """Return the verdict in words; of losses, less is better."""
        if math.isnan(self.mean):
            return "no comparison: a run failed or diverged"
        if math.isnan(self.low):
            return "noise is not known: one seed, or all differ by the same"
        if self.low <= 0 <= self.high:
            return "no difference beyond noise"
        return f"{below if self.high < 0 else above} than {reference} by {abs(self.mean):.3f}"


def paired(values: Sequence[float], reference: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Return the mean of values minus the reference's at the same seeds, ± t s / √n with Student's t of n - 1.

    All is NaN if the reference has no values.
    """
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
