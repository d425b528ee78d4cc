"""Whether two models differ by more than their seeds do: the t-test of the differences, one of each seed.

    t = mean / (s / sqrt(n)) with the sample standard deviation s of n differences, of n - 1 degrees of freedom

Seeds are paired, because a seed gives both models the same batches in the same order. Of whole degrees of freedom the
distribution of t is a sum (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4), so that no table and no package is needed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

SIGNIFICANCE = 0.05


def p_value(differences: Sequence[float]) -> float:
    """The chance of a mean as far from 0, to either side, if that of all seeds is 0; of two differences or more."""
    mean, spread, degrees = statistics.fmean(differences), statistics.stdev(differences), len(differences) - 1
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    angle = math.atan(abs(mean) / spread * math.sqrt(len(differences) / degrees))
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for index in range(1, degrees // 2 + 1):
        total += term
        term *= math.cos(angle) ** 2 * (2 * index - 1 + odd) / (2 * index + odd)
    within = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + within) if odd else within)
