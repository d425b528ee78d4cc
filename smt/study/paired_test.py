"""Whether two models differ by more than their seeds do: the t-test of the differences, one of each seed.

    t = mean / standard error of n differences, of n - 1 degrees of freedom

Seeds are paired, because a seed gives both models the same batches in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

from smt.evaluation.statistics import mean_of, t_within

SIGNIFICANCE = 0.05


def p_value(differences: Sequence[float]) -> float:
    """The chance of a mean as far from 0, to either side, if that of all seeds is 0; of two differences or more."""
    found = mean_of(differences)
    if found.standard_error == 0:
        return 1.0 if found.mean == 0 else 0.0
    return 1 - t_within(abs(found.mean) / found.standard_error, len(differences) - 1)
