"""Settings that act in different places, combined in pairs instead of all with all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest


def in_turn(
    cases: Sequence[Any], values: Sequence[Any], name: Callable[[Any], str] = str, *, native: Collection[int] = ()
) -> list[Any]:
    """Every case with one of the values, by turns, and the first case with each: parameter sets of two.

    Those of the cases with an index in ``native`` are marked as what to run first on a GPU.
    """
    pairs = [(0, value) for value in values]
    pairs += [(i, values[i % len(values)]) for i in range(1, len(cases))]
    return [
        pytest.param(cases[i], value, id=f"{cases[i]}-{name(value)}", marks=[pytest.mark.native] if i in native else [])
        for i, value in pairs
    ]
