"""Rings: entry e of a row's sequence lies at index e % size, so rows that have come to different entries share one layout.

A new entry overwrites the one that just left the window, and appending is one write of constant size. Where entries lie is
counted on the device, of tensors: what is recorded or compiled at one step serves at every other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smt.runtime.device import from_host


def ends(first: int, stops: Sequence[int], device: torch.device) -> int | Tensor:
    """Where in sequences that begin with the entry ``first`` each row's ``stops`` lie: one number if it is that of all rows,
    else (B,) int64 on ``device``."""
    if len(set(stops)) == 1:
        return stops[0] - first
    return from_host([stop - first for stop in stops], device)


def last_entries(values: Tensor, end: int | Tensor, size: int) -> Tensor:
    """The ``size`` entries before ``end`` of each row of values (B, L, ...), oldest first, (B, size, ...); zeros where there
    are none."""
    if isinstance(end, Tensor):
        return take(values, end[:, None] + torch.arange(-size, 0, device=values.device))
    held = values[:, max(0, end - size) : end]
    missing = size - held.shape[1]
    return torch.cat([held.new_zeros(held.shape[0], missing, *held.shape[2:]), held], dim=1) if missing else held


def to_ring(values: Tensor, stop: Tensor, dim: int = 1) -> Tensor:
    """The rings of rows whose last entries are ``values``, oldest first along ``dim``, behind the dimension of the rows.

    Args:
        stop: (B,) int64, one past the last entry of each row, or (1,) for all rows alike.
    """
    size = values.shape[dim]
    return _entries(values, torch.arange(size, device=values.device) - stop[:, None], dim) if size else values


def from_ring(ring: Tensor, stop: Tensor, count: int, dim: int = 1, rows: Tensor | None = None) -> Tensor:
    """The ``count`` entries before ``stop``, oldest first: the inverse of ``to_ring``.

    Args:
        rows: (B,) int64, the rows of ``ring`` that ``stop`` is of; None: all.
    """
    if count == 0:
        return ring.narrow(dim, 0, 0) if rows is None else ring.index_select(dim - 1, rows).narrow(dim, 0, 0)
    return _entries(ring, torch.arange(-count, 0, device=ring.device) + stop[:, None], dim, rows)


def _entries(ring: Tensor, entry: Tensor, dim: int, rows: Tensor | None = None) -> Tensor:
    """What lies at ``entry`` (B, I) or (1, I), whatever its round."""
    index = entry % ring.shape[dim]
    if rows is None and index.shape[0] == 1:
        return ring.index_select(dim, index[0])
    if rows is None:
        rows = torch.arange(index.shape[0], device=ring.device)
    return ring[(*[slice(None)] * (dim - 1), rows[:, None], index)]


def take(values: Tensor, position: Tensor, dim: int = 1) -> Tensor:
    """The entries ``position`` (B, I) int64 of each row of ``values``, along ``dim``, behind the dimension of the rows; zeros
    where a position lies outside."""
    batch, length = values.shape[dim - 1 : dim + 1]
    if length == 0:
        return values.new_zeros(*values.shape[:dim], position.shape[1], *values.shape[dim + 1 :])
    inside = (position >= 0) & (position < length)
    rows = torch.arange(batch, device=values.device)[:, None]
    taken = values[(*[slice(None)] * (dim - 1), rows, position.clamp(0, length - 1))]
    return taken.masked_fill(~inside.reshape(*inside.shape, *[1] * (values.ndim - dim - 1)), 0)
