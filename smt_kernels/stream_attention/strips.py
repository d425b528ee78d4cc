"""Strips: which consecutive rows of queries, slots and tokens each block of queries works on, and which of them it sees.

A block owns three strips of consecutive rows: its queries, the slots that any of them sees and the tokens that any of them
sees. From one block to the next a strip advances by a fixed number of rows, so the strips of many blocks are one overlapping
view. Blocks hold whole strides, so that all have the same bias, but for rows that do not exist at the ends of the sequence:
those are gathered as zeros and masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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

    def of(self, blocks: range) -> Strip:
        """The same rows, counted from the first of ``blocks`` on."""
        return replace(self, start=self.start + self.advance * blocks.start)

    def complete(self, n_blocks: int) -> bool:
        """Whether all rows of the first blocks exist."""
        return self.start >= 0 and self._stop(n_blocks) <= self.size

    def exists(self, n_blocks: int, device: torch.device) -> Tensor:
        """Which rows exist, as bool (n_blocks, length)."""
        first = self.start + self.advance * torch.arange(n_blocks, device=device)
        row = first[:, None] + torch.arange(self.length, device=device)
        return (row >= 0) & (row < self.size)

    def gather(self, x: Tensor, n_blocks: int) -> Tensor:
        """The strips of x (B, rows, H, D), (B, n_blocks, H, length, D): a view where all rows exist, else of a padded copy."""
        start = self.start
        if not self.complete(n_blocks):
            first, last = self._existing(n_blocks)
            x = pad(x[:, first:last], (0, 0, 0, 0, first - start, self._stop(n_blocks) - last))
            start = 0
        return _strips(x, start, self.advance, n_blocks, self.length)

    def add(self, x: Tensor, values: Tensor) -> None:
        """The transpose of ``gather``: add values (B, n_blocks, H, length, D) to x (B, rows, H, D), in a fixed order."""
        n_blocks, start, target = values.shape[1], self.start, x
        if not self.complete(n_blocks):
            start, target = 0, x.new_zeros(x.shape[0], self._stop(n_blocks) - self.start, *x.shape[2:])
        # Blocks that are ``apart`` blocks away from each other share no rows, and are added at once.
        apart = min(n_blocks, -(-self.length // self.advance)) if self.advance else n_blocks
        for first in range(apart):
            of_these = values[:, first::apart]
            rows = _strips(target, start + self.advance * first, self.advance * apart, of_these.shape[1], self.length)
            rows.add_(of_these)
        if target is not x:
            first, last = self._existing(n_blocks)
            x[:, first:last].add_(target[:, first - self.start : last - self.start])

    def write(self, x: Tensor, values: Tensor) -> None:
        """Write values (B, n_blocks, H, length, D) to x (B, rows, H, D) where rows exist, of strips side by side."""
        n_blocks = values.shape[1]
        if self.complete(n_blocks):
            _strips(x, self.start, self.advance, n_blocks, self.length).copy_(values)
        else:
            first, last = self._existing(n_blocks)
            x[:, first:last] = values.transpose(2, 3).flatten(1, 2)[:, first - self.start : last - self.start]

    def _existing(self, n_blocks: int) -> tuple[int, int]:
        """Of all rows of the blocks, [first, last) exist; empty, and among the blocks' rows, if none does."""
        stop = self._stop(n_blocks)
        first = min(max(self.start, 0), stop)
        return first, max(min(stop, self.size), first)

    def _stop(self, n_blocks: int) -> int:
        return self.start + self.advance * (n_blocks - 1) + self.length


@dataclass(frozen=True)
class Run:
    """Blocks of one geometry: the strips of each, and which of its keys [slots | tokens] a query sees where they exist."""

    n_blocks: int
    queries: Strip
    slots: Strip
    tokens: Strip
    visible: Tensor  # (queries, keys)

    def of(self, blocks: range) -> Run:
        """These blocks alone."""
        strips = (strip.of(blocks) for strip in (self.queries, self.slots, self.tokens))
        return Run(len(blocks), *strips, self.visible)

    @property
    def complete(self) -> bool:
        """Whether all keys exist."""
        return self.slots.complete(self.n_blocks) and self.tokens.complete(self.n_blocks)

    def bias(self, like: Tensor) -> Tensor:
        """What to add to the scores, 0 or -inf: (1 if complete, else n_blocks, queries, keys)."""
        visible = self.visible[None]
        if not self.complete:
            exists = [strip.exists(self.n_blocks, visible.device) for strip in (self.slots, self.tokens)]
            visible = visible & torch.cat(exists, dim=1)[:, None]
        return like.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))


def runs(q: Tensor, k: Tensor, memory: Tensor, window: WindowSpec, first_step: int, first_slot: int) -> Iterator[Run]:
    """The geometry of each run of blocks; every query is in exactly one."""
    if window.n_tokens > k.shape[1]:  # no query sees more tokens than there are: a strip of all of them would be padding
        window = replace(window, n_tokens=max(k.shape[1], window.stride or 0))
    end = first_step + k.shape[1]
    first_query = end - q.shape[1]
    n_slots = memory.shape[1]
    if window.stride is not None:
        # Slots that no query sees are left out like those that do not exist: a weight of 0 times what they hold may be nan.
        seen = window.visible_slots(end - 1)[1] - first_slot if window.n_memory else 0
        n_slots = min(max(seen, 0), n_slots)
        window = replace(window, n_memory=min(window.n_memory, max(seen, 0)))  # a strip of more slots would be padding, too
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


def _strips(x: Tensor, start: int, advance: int, n_blocks: int, length: int) -> Tensor:
    """Rows [start + advance * i, ... + length) of x (B, rows, H, D) for block i: a view (B, n_blocks, H, length, D)."""
    batch, _, heads, width = x.shape
    of_batch, of_row, of_head, of_column = x.stride()
    strides = of_batch, advance * of_row, of_head, of_row, of_column
    return x.as_strided((batch, n_blocks, heads, length, width), strides, x.storage_offset() + start * of_row)


def _clip(interval: tuple[int, int], low: int, high: int) -> tuple[int, int]:
    """The part of [start, stop) that lies in [low, high), empty if none does."""
    start = min(max(interval[0], low), high)
    return start, max(min(interval[1], high), start)
