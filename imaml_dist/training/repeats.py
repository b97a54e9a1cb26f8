"""Repeats of a run under several seeds: the mean, how far seeds lie apart, and how sure the mean is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Results of n independent repeats.

    Attributes:
        mean: of the results.
        sd: their standard deviation, with n - 1; nan for one.
        ci95: half width of the 95% interval of the mean, `t s / sqrt(n)` with Student's t of n - 1 degrees of freedom; nan for one.
        n: number of repeats.
    """

    mean: float
    sd: float
    ci95: float
    n: int

    @staticmethod
    def of(results: Sequence[float]) -> Spread:
        """Of n >= 1 results."""
        n = len(results)
        mean = math.fsum(results) / n
        if n == 1:
            return Spread(mean, math.nan, math.nan, 1)
        sd = math.sqrt(math.fsum((result - mean) ** 2 for result in results) / (n - 1))
        return Spread(mean, sd, student_t(n - 1) * sd / math.sqrt(n), n)


def student_t(degrees: int, within: float = 0.95) -> float:
    """The t between whose negative and which a share `within` of Student's distribution lies.

    Args:
        degrees: of freedom, >= 1.
        within: 0 < share < 1.

    Source: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4: for whole degrees of freedom the share is a finite sum.
    """
    low, high = 0.0, 1.0
    while _share(high, degrees) < within:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _share(middle, degrees) < within else (low, middle)
    return high


def _share(t: float, degrees: int) -> float:
    angle = math.atan(t / math.sqrt(degrees))
    odd, cosine = degrees % 2, math.cos(angle)
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= (k - 1) / k * cosine * cosine
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
