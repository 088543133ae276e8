"""Find the noise edge of a spectrum: count the singular values that stand out of what noise alone would give.

Noise of independent entries with standard deviation s puts the singular values of W (m × n), β = m / n <= 1, into s √n
(1 ± √β), with a density known as the Marchenko-Pastur law (1967). s comes from the median singular value, s = σ_med /
√(n μ_β), μ_β the law's median: Gavish and Donoho 2014, "The Optimal Hard Threshold for Singular Values is 4/√3", arXiv
1305.5870, for an unknown noise level. The edge is s √n (1 + √β).

This assumes that W is such noise and a signal whose rank is far below m / 2, so that the median is the noise's. Where
the signal has more, s and the edge come out too high and the count too low. What surrounds the signal of a trained
weight is not independent noise: the count says what stands out of the bulk, not that the bulk is worthless. For noise
alone, the largest value exceeds its edge about one time in six, by a share that vanishes as m^(-2/3).
"""

from __future__ import annotations

import functools
import math
import statistics

import torch
from torch import Tensor

POINTS = 1 << 14


@functools.cache
def marchenko_pastur_median(beta: float) -> float:
    """Return the median μ_β of the Marchenko-Pastur law for σ² / (n s²), 0 < β <= 1, to 1e-6, by the midpoint rule."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    angle = (torch.arange(POINTS, dtype=torch.float64) + 0.5) * (math.pi / 2 / POINTS)
    x = low + (high - low) * angle.sin().square()  # in this variable the density has no roots at its ends
    mass = ((2 * angle).sin().square() / x).cumsum(0)
    i = int((mass < mass[-1] / 2).sum())
    before = mass[i - 1].item()
    within = (mass[-1].item() / 2 - before) / (mass[i].item() - before)
    at = (i + within) * math.pi / 2 / POINTS  # mass[i] is what lies below the end of the i-th interval
    return low + (high - low) * math.sin(at) ** 2


def edge(S: Tensor, shape: tuple[int, int]) -> float:
    """Return the largest singular value that noise alone would have, from all singular values S of a weight."""
    m, n = sorted(shape)
    noise = statistics.median(S.tolist()) / math.sqrt(n * marchenko_pastur_median(m / n))
    return noise * (math.sqrt(n) + math.sqrt(m))


def signal(S: Tensor, shape: tuple[int, int]) -> int:
    """Count the singular values S of a weight of this `shape` above the noise edge; 0 for a weight of zeros."""
    return int((edge(S, shape) < S).sum())


def stable_rank(S: Tensor) -> float:
    """Return Σσ² / σ_max² (Rudelson and Vershynin 2007, arXiv math/0503442), at most the rank; 0 for zeros."""
    squares = S.double().square()
    return (squares.sum() / squares.max()).item() if squares.any() else 0.0


def effective_rank(S: Tensor) -> float:
    """Return exp of the entropy of σ / Σσ (Roy and Vetterli 2007): as many equal singular values are as spread out."""
    p = S.double() / S.double().sum().clamp_min(1e-300)
    return torch.special.entr(p).sum().exp().item()
