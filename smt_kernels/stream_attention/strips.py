"""Strips: which consecutive rows of queries, slots and tokens each block of queries works on, and which of them it sees.

A block owns three strips of consecutive rows: its queries, the slots that any of them sees and the tokens that any of them
sees. From one block to the next a strip advances by a fixed number of rows, so the strips of many blocks are one overlapping
view. Blocks hold whole strides, so that all have the same bias, but for rows that do not exist at the ends of the sequence:
those are gathered as zeros and masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from smt_kernels.window import WindowSpec

# Queries per block, rounded up to whole strides: larger blocks spend more on masked keys, smaller ones run slower per key.
BLOCK_QUERIES = 32


@dataclass(frozen=True)
class Strip:
    """Rows [start + advance * i, start + advance * i + length) of a tensor, for block i. Only the rows 0..size - 1 exist."""

    start: int
    length: int
    advance: int
    size: int

    def covered(self, blocks: range) -> tuple[int, int]:
        """The rows [start, stop) of these blocks together, existing or not."""
        start = self.start + self.advance * blocks.start
        return start, start + self.advance * (len(blocks) - 1) + self.length

    def existing(self, blocks: range) -> tuple[int, int]:
        """The rows [start, stop) of these blocks that exist."""
        return _clip(self.covered(blocks), 0, self.size)

    def complete(self, blocks: range) -> bool:
        """Whether all rows of these blocks exist."""
        return self.existing(blocks) == self.covered(blocks)

    def exists(self, blocks: range, device: torch.device) -> Tensor:
        """Which rows exist, as bool (blocks, length)."""
        first = self.start + self.advance * torch.arange(blocks.start, blocks.stop, device=device)
        row = first[:, None] + torch.arange(self.length, device=device)
        return (row >= 0) & (row < self.size)

    def gather(self, x: Tensor, blocks: range) -> Tensor:
        """The strips of x (B, rows, H, D), (B, blocks, length, H, D): a view where all rows exist, else of a padded copy."""
        (start, stop), (first, last) = self.covered(blocks), self.existing(blocks)
        x = x[:, first:last]
        if not self.complete(blocks):
            before = min(max(first - start, 0), stop - start)
            x = pad(x, (0, 0, 0, 0, before, stop - start - before - (last - first)))
        if self.advance == 0:
            return x[:, None].expand(-1, len(blocks), -1, -1, -1)
        return x.unfold(1, self.length, self.advance).movedim(-1, 2)

    def add(self, x: Tensor, blocks: range, values: Tensor) -> None:
        """The transpose of ``gather``: add values (B, blocks, length, H, D) to x (B, rows, H, D), in a fixed order."""
        for i, of_block in zip(blocks, values.unbind(1), strict=True):
            (start, _), (first, last) = self.covered(range(i, i + 1)), self.existing(range(i, i + 1))
            x[:, first:last].add_(of_block[:, first - start : last - start])


@dataclass(frozen=True)
class Run:
    """Blocks of one geometry: the strips of each, and which of its keys [slots | tokens] a query sees where they exist."""

    n_blocks: int
    queries: Strip
    slots: Strip
    tokens: Strip
    visible: Tensor  # (queries, keys)

    def complete(self, blocks: range) -> bool:
        """Whether all keys of these blocks exist."""
        return self.slots.complete(blocks) and self.tokens.complete(blocks)

    def bias(self, blocks: range, like: Tensor) -> Tensor:
        """What to add to the scores of these blocks, 0 or -inf: (1 if complete, else blocks, queries, keys)."""
        visible = self.visible[None]
        if not self.complete(blocks):
            exists = [strip.exists(blocks, visible.device) for strip in (self.slots, self.tokens)]
            visible = visible & torch.cat(exists, dim=1)[:, None]
        return like.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))


def runs(q: Tensor, k: Tensor, memory: Tensor, window: WindowSpec, first_step: int, first_slot: int) -> Iterator[Run]:
    """The geometry of each run of blocks; every query is in exactly one."""
    end = first_step + k.shape[1]
    first_query = end - q.shape[1]
    n_slots = memory.shape[1]
    if window.stride is not None:
        # Slots that no query sees are left out like those that do not exist: a weight of 0 times what they hold may be nan.
        seen = window.visible_slots(end - 1)[1] - first_slot if window.n_memory else 0
        n_slots = min(max(seen, 0), n_slots)
    for first, stop, advancing in _pieces(first_query, end, window, n_slots > 0):
        length = -(-BLOCK_QUERIES // window.stride) * window.stride if advancing else min(BLOCK_QUERIES, stop - first)
        n_blocks = -(-(stop - first) // length)
        last = first + length - 1  # of the first block
        tokens = window.visible_tokens(first)[0], last + 1
        slots = first_slot, first_slot + n_slots
        if n_slots and window.stride is not None:
            slots = window.visible_slots(first)[0], window.visible_slots(last)[1]
        if n_blocks == 1:
            # A single block gathers only what exists, and a single query then needs no mask: the case of decoding.
            tokens = _clip(tokens, first_step, end)
            slots = _clip(slots, first_slot, first_slot + n_slots)
        if length == 1:
            visible = torch.ones(1, slots[1] - slots[0] + tokens[1] - tokens[0], dtype=torch.bool, device=q.device)
        else:
            query_step = torch.arange(first, last + 1, device=q.device)
            slot_visible = window.slot_visible(query_step, torch.arange(*slots, device=q.device))
            token_visible = window.token_visible(query_step, torch.arange(*tokens, device=q.device))
            visible = torch.cat([slot_visible, token_visible], dim=1)
        yield Run(
            n_blocks,
            queries=Strip(first - first_query, length, length, stop - first_query),
            slots=Strip(slots[0] - first_slot, slots[1] - slots[0], length // window.stride if advancing else 0, n_slots),
            tokens=Strip(tokens[0] - first_step, tokens[1] - tokens[0], length, k.shape[1]),
            visible=visible,
        )


def _pieces(start: int, stop: int, window: WindowSpec, has_slots: bool) -> Iterator[tuple[int, int, bool]]:
    """Cut steps [start, stop) so that in each piece the slots stay, or advance by one per stride, or there is one block."""
    if not has_slots or window.stride is None or stop - start <= BLOCK_QUERIES:
        yield start, stop, False
    elif start <= 0:  # Nothing is written before step 1.
        yield start, min(stop, 1), False
        if stop > 1:
            yield from _pieces(1, stop, window, has_slots)
    elif window.stride <= BLOCK_QUERIES:
        yield start, stop, True
    else:  # A stride longer than a block is a piece by itself.
        while start < stop:
            end = min(stop, window.block_end(window.block_of(start)) + 1)
            yield start, end, False
            start = end


def _clip(interval: tuple[int, int], low: int, high: int) -> tuple[int, int]:
    """The part of [start, stop) that lies in [low, high), empty if none does."""
    start = min(max(interval[0], low), high)
    return start, max(min(interval[1], high), start)
