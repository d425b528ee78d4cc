"""Rings: entry e of a row's sequence lies at index e % size, so rows that have come to different entries share one layout.

A new entry overwrites the one that just left the window, and appending is one write of constant size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_ring(values: Tensor, first: int, stops: Sequence[int], size: int) -> Tensor:
    """The rings (B, size, ...) of rows that have come to the entries before ``stops``, one per row.

    Args:
        values: (B, L, ...), of which values[:, 0] is entry ``first``; entries before it are zero in the ring.
    """
    if size == 0:
        return values[:, :0]
    if len(set(stops)) == 1:
        held = values[:, : stops[0] - first]
        missing = size - held.shape[1]
        if missing > 0:
            held = torch.cat([held.new_zeros(held.shape[0], missing, *held.shape[2:]), held], dim=1)
        return held[:, held.shape[1] - size :].roll(stops[0] % size, dims=1)
    last = torch.tensor(stops, device=values.device)[:, None] - 1
    entry = last - (last - torch.arange(size, device=values.device)) % size
    return take(values, entry - first)


def from_ring(ring: Tensor, stop: int, count: int) -> Tensor:
    """The ``count`` entries before ``stop``, oldest first: (B, count, ...)."""
    size = ring.shape[1]
    return ring.roll(-(stop % size), dims=1)[:, size - count :] if size else ring


def take(values: Tensor, position: Tensor) -> Tensor:
    """values[r, position[r, i]] as (B, I, ...), zeros where a position lies outside values (B, L, ...).

    Args:
        position: (B, I) int64, or (1, I) for all rows alike.
    """
    batch, length = values.shape[:2]
    if length == 0:
        return values.new_zeros(batch, position.shape[1], *values.shape[2:])
    inside = (position >= 0) & (position < length)
    position = position.clamp(0, length - 1)
    if position.shape[0] == 1:
        taken = values.index_select(1, position[0])
    else:
        taken = values[torch.arange(batch, device=values.device)[:, None], position]
    return taken.masked_fill(~inside.reshape(*inside.shape, *[1] * (values.ndim - 2)), 0)


def last_entries(ring: Tensor, rows: Tensor, stop: Tensor, count: int) -> Tensor:
    """The ``count`` entries before ``stop`` (R,) of each of the ``rows`` (R,), oldest first: (R, count, ...)."""
    if count == 0:
        return ring.new_empty(len(rows), 0, *ring.shape[2:])
    entry = stop[:, None] + torch.arange(-count, 0, device=ring.device)
    return ring[rows[:, None], entry % ring.shape[1]]
