"""Gated writes as ungated ones: each row's gated-on writes are moved to its front, all K run, and results are moved back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """How the gated-on writes of each row are moved to its front and back."""

    off: Tensor  # (K, B, 1), where the gate is off
    behind: Tensor  # (K, B, 1), which places are left behind the moved writes
    count: Tensor  # (1, B, 1), gated-on writes
    to_front: Tensor | None  # (K, B, 1), which write comes to each place; None where K = 1 leaves no choice
    to_place: Tensor | None  # (K, B, 1), where each gated-on write has gone

    def conv_rows(self, conv_state: Tensor) -> Tensor:
        """Which conv inputs are the conv state of each row after its gated-on writes, (C - 1, B, E)."""
        batch, width, history = conv_state.shape
        return (self.count + torch.arange(history, device=conv_state.device)[:, None, None]).expand(-1, batch, width)


def order_of(gate: Tensor) -> Order:
    gate = gate.T[..., None]
    off = ~gate
    if len(gate) == 1:
        return Order(off, off, gate.long(), None, None)
    passed = gate.cumsum(0)
    behind = torch.arange(len(gate), device=gate.device)[:, None, None] >= passed[-1:]
    return Order(off, behind, passed[-1:], off.to(torch.uint8).argsort(dim=0, stable=True), (passed - 1).clamp_(min=0))


def to_front(x: Tensor, order: Order | None) -> Tensor:
    """x (B, K, E) as (K, B, E) in the accumulation dtype, each row's gated-on writes first and zeros behind them."""
    x = accumulation(x).transpose(0, 1)
    if order is None:
        return x
    x = x.masked_fill(order.off, 0.0)
    return x if order.to_front is None else x.gather(0, order.to_front.expand_as(x))


def to_place(x: Tensor, order: Order | None) -> Tensor:
    """The inverse of ``_to_front``: x (K, B, E) as (B, K, E), back in place and 0 where the gate is off."""
    if order is not None:
        x = x if order.to_place is None else x.gather(0, order.to_place.expand_as(x))
        x = x.masked_fill(order.off, 0.0)
    return x.transpose(0, 1)


def accumulation(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
