"""Means of independent samples, their standard errors, and Student's t, which says how far off a mean of few of them may be.

    standard error = s / sqrt(n)    with the sample standard deviation s of n samples
    margin         = t(n - 1) * standard error    half the width of the interval that holds the true mean with 95 %

Of whole degrees of freedom the distribution of t is a sum (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4), so that no table
and no package is needed.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far off it may be.

    Attributes:
        mean: of the samples.
        standard_error: of the mean; None of one sample, by which nothing can be told.
        n_samples: that it is taken over.
    """

    mean: float
    standard_error: float | None
    n_samples: int

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % interval."""
        return None if self.standard_error is None else t_quantile(self.n_samples - 1) * self.standard_error


def mean_of(samples: Sequence[float]) -> Estimate:
    """The mean of one sample or more."""
    return mean_per_count(samples, [1] * len(samples))


def mean_difference(samples: Sequence[float], others: Sequence[float]) -> Estimate:
    """The mean of ``samples`` minus ``others``, pair by pair: what both of a pair have in common cancels."""
    return mean_of([sample - other for sample, other in zip(samples, others, strict=True)])


def mean_per_count(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Sums over counts, of samples that each give a sum and its count; the error by the linearised variance."""
    n, total = len(sums), sum(counts)
    mean = sum(sums) / total
    residuals = [of_sample - mean * count for of_sample, count in zip(sums, counts, strict=True)]
    squares = sum(residual * residual for residual in residuals)
    return Estimate(mean, math.sqrt(squares * n / (n - 1)) / total if n > 1 else None, n)


@functools.cache
def t_quantile(degrees: int) -> float:
    """The t that |T| of so many degrees of freedom stays below with 95 %."""
    # From the quantile of the normal distribution, which is smaller, Newton's steps grow towards it: t_within bends down.
    t = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    scale = 2 * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi * degrees)
    while True:
        density = scale * (1 + t * t / degrees) ** (-(degrees + 1) / 2)
        step = (CONFIDENCE - t_within(t, degrees)) / density
        t += step
        if step < 1e-9 * t:
            return t


def t_within(t: float, degrees: int) -> float:
    """The probability of |T| <= t, t >= 0, of so many degrees of freedom."""
    angle, odd = math.atan(t / math.sqrt(degrees)), degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for index in range(1, degrees // 2 + 1):
        total += term
        term *= math.cos(angle) ** 2 * (2 * index - 1 + odd) / (2 * index + odd)
    within = math.sin(angle) * total
    return 2 / math.pi * (angle + within) if odd else within
