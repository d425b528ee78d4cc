"""Which writes of each row happen: a table by which inputs are read where they lie, so that all writes are computed at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Order(NamedTuple):
    """Which writes of each row happen, counted: None where all do."""

    rank: Tensor  # (B, K) int32, how many happen before each one that does; -1 where the gate is off
    place: Tensor  # (B, K) int32, where each of those that happen stands; behind them, anything
    count: Tensor  # (B,) int32, how many happen


def order_of(gate: Tensor | None) -> Order | None:
    """The order of the writes of ``gate`` (B, K), in a few operations and without reading anything back."""
    if gate is None:
        return None
    passed = gate.cumsum(1, dtype=torch.int32)
    place = (~gate).to(torch.uint8).argsort(dim=1, stable=True)
    return Order(torch.where(gate, passed - 1, -1).contiguous(), place.to(torch.int32).contiguous(), passed[:, -1].contiguous())


def fields_of(order: Order | None) -> dict[str, Tensor | None]:
    """As arguments of a kernel."""
    return dict.fromkeys(Order._fields) if order is None else order._asdict()


@triton.jit
def ranks(order, i_batch, o_step, m_step, n_total):
    """The rank of each write of a row, -1 where it does not happen, and how many of the row happen."""
    rank, _, count = order
    if rank is not None:
        o_rank = tl.load(rank + i_batch * n_total + o_step, mask=m_step, other=-1)
        n_on = tl.load(count + i_batch, mask=m_step, other=0)
    else:
        o_rank = tl.where(m_step, o_step, -1)
        n_on = tl.where(m_step, n_total, 0)
    return o_rank, n_on


@triton.jit
def places(order, i_batch, o_rank, mask, n_total):
    """Where the writes of some ranks stand."""
    _, place, _ = order
    if place is not None:
        o_rank = tl.load(place + i_batch * n_total + o_rank, mask=mask, other=0)
    return o_rank.to(tl.int64)
