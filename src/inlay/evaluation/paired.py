"""Paired differences, their confidence intervals, and what they say where many are looked at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

CONFIDENCE = 0.95
POWER = 0.8  # how often a difference of `detectable` size would be seen


@dataclass(frozen=True)
class Difference:
    """Hold the mean of paired differences and its confidence interval.

    The interval is NaN for a single pair, and for pairs that all differ by the same.

    Attributes:
        mean, low, high: the mean, and the ends of its interval.
        error: the standard error of the mean; NaN where there is no interval.
        pairs: how many there are.
        confidence: of the interval.
    """

    mean: float
    low: float
    high: float
    error: float = math.nan
    pairs: int = 0
    confidence: float = CONFIDENCE

    def shown(self) -> str:
        """Return the difference as text; empty where there is none."""
        interval = "" if math.isnan(self.low) else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return "" if math.isnan(self.mean) else f"{self.mean:+.3f}{interval}"

    def at(self, confidence: float) -> Difference:
        """Return the difference with its interval at another confidence: ± t s / √n, Student's t of n - 1."""
        if math.isnan(self.error):
            return replace(self, confidence=confidence)
        half = self.error * quantile((1 + confidence) / 2, self.pairs - 1)
        return replace(self, low=self.mean - half, high=self.mean + half, confidence=confidence)

    @property
    def p_value(self) -> float:
        """Return the two-sided p-value of Student's t test; NaN where the noise is not known."""
        if math.isnan(self.error):
            return math.nan
        if not self.error:
            return 0.0 if self.mean else 1.0
        from scipy.stats import t  # half a second

        return 2 * float(t.sf(abs(self.mean) / self.error, self.pairs - 1))

    @property
    def detectable(self) -> float:
        """Return the true difference that so many pairs, as noisy as these, show four times in five."""
        if math.isnan(self.error):
            return math.nan
        degrees = self.pairs - 1
        return self.error * (quantile((1 + self.confidence) / 2, degrees) + quantile(POWER, degrees))

    def verdict(self, reference: str, margin: float = 0.0, below: str = "better", above: str = "worse") -> str:
        """Return the verdict in words: equivalent, better, worse, or that these pairs cannot tell.

        Args:
            reference: with which it is compared.
            margin: differences up to here do not matter; where all of the interval is within, both are equivalent.
            below: the word where the difference is below 0; of losses, less is better.
            above: the word where it is above.
        """
        if math.isnan(self.mean):
            return "no comparison: a run failed or diverged"
        if math.isnan(self.low):
            return "cannot tell: noise is not known with one seed, or where all differ by the same"
        if margin and -margin <= self.low and self.high <= margin:
            return f"equivalent to {reference} within {margin:g}"
        if self.low <= 0 <= self.high:
            return f"cannot tell from {reference}: these runs would show {self.detectable:.3f}"
        return f"{below if self.high < 0 else above} than {reference} by {abs(self.mean):.3f}"


def quantile(share: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution."""
    from scipy.stats import t  # half a second

    return float(t.ppf(share, degrees))


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
    n = len(differences)
    return Difference(mean, mean, mean, statistics.stdev(differences) / math.sqrt(n), n).at(confidence)


def holm(differences: Mapping[str, Difference], confidence: float = CONFIDENCE) -> dict[str, Difference]:
    """Return differences with the intervals by which each is judged, so that all signs hold together (Holm 1979).

    The smallest of m p-values is judged at α / m, the next at α / (m − 1), and so on until one is not below its bound;
    that one and all larger ones have the interval of its bound, and every such interval includes 0. With the given
    confidence no interval leaves out 0 wrongly. As bounds for sizes they hold one by one: of seven intervals that all
    leave out 0, one misses its difference more often than that.
    """
    known = sorted((d.p_value, name) for name, d in differences.items() if not math.isnan(d.p_value))
    corrected, bound = dict(differences), 0.0
    failed = False
    for place, (p, name) in enumerate(known):
        if not failed:
            bound = (1 - confidence) / (len(known) - place)
            failed = p > bound
        corrected[name] = differences[name].at(1 - bound)
    return corrected
