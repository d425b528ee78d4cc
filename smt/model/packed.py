"""Packed texts: one behind the other in one row of tokens, without padding; to the model each is a row of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import index

from torch import Tensor


def text_bounds(cu_seqlens: Tensor | Sequence[int], input_ids: Tensor, name: str = "cu_seqlens") -> tuple[int, ...]:
    """Where each of N texts begins, and the end of the last; read from the device where ``cu_seqlens`` is on one.

    Args:
        cu_seqlens: (N + 1,) integers, called ``name``.
        input_ids: (1, T), the texts.

    Raises:
        TypeError: not integers.
        ValueError: ``input_ids`` of several rows, or numbers that do not rise from 0 to T.
    """
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids must have shape (1, T) beside {name}, got {tuple(input_ids.shape)}")
    bounds = tuple(cu_seqlens.flatten().tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
    if any(isinstance(bound, bool) or not hasattr(bound, "__index__") for bound in bounds):
        raise TypeError(f"{name} must be integers, got {bounds}")
    bounds = tuple(index(bound) for bound in bounds)  # NumPy's are none of Python's
    length = input_ids.shape[1]
    if bounds[:1] != (0,) or bounds[-1] != length or any(n < 1 for n in text_lengths(bounds)):
        raise ValueError(f"{name} must rise from 0 to T = {length}, the end of the last text, got {bounds}")
    return bounds


def text_lengths(bounds: Sequence[int]) -> tuple[int, ...]:
    """Tokens of each text."""
    return tuple(stop - start for start, stop in pairwise(bounds))
