"""Settings that act in different places, combined in pairs instead of all with all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest


def in_turn(cases: Sequence[Any], values: Sequence[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """Every case with one of the values, by turns, and the first case with each: parameter sets of two."""
    pairs = [(cases[0], value) for value in values]
    pairs += [(case, values[i % len(values)]) for i, case in enumerate(cases) if i > 0]
    return [pytest.param(case, value, id=f"{case}-{name(value)}") for case, value in pairs]
