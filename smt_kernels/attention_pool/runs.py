"""Runs: consecutive writes whose windows are pooled together, as dense products over the entries that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from smt_kernels.window import WindowSpec

# Writes per dense product of a long call: with more, more of a product falls on entries that the window does not see;
# with fewer, more entries are shared by two products and more operations are launched.
WRITES_PER_PRODUCT = 16


def accumulation(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def visibility(seen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """average and hidden of windows that see the entries ``seen`` (..., L)."""
    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return seen.to(dtype) / seen.sum(-1, keepdim=True), hidden


class _Piece(NamedTuple):
    """``size`` consecutive entries of source 0 (tokens) or 1 (slots) from ``start`` on; of None: entries that do not exist."""

    source: int | None
    start: int
    size: int


class Layout(NamedTuple):
    """Which of the L entries that P windows share each of them sees."""

    average: Tensor  # (1, P, L)
    hidden: Tensor  # (1, P, L)
    index: Tensor  # (1, P, W), where entry i of a window lies among the L


class Run(NamedTuple):
    """The consecutive writes ``writes`` of a call, pooled together, and the entries that they share: slots, then tokens."""

    writes: slice
    pieces: list[_Piece]
    layout: Layout

    def gather(self, *sources: Tensor | None) -> Tensor:
        """The shared entries (B, L, d), zeros where they do not exist."""
        batch, _, width = sources[0].shape
        parts = [
            sources[0].new_zeros(batch, size, width) if source is None else sources[source].narrow(1, start, size)
            for source, start, size in self.pieces
        ]
        return accumulation(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def add_back(self, dx: Tensor, *sums: Tensor | None) -> None:
        """Add the gradient (B, L, d) of the shared entries to where they came from."""
        parts = dx.split([piece.size for piece in self.pieces], dim=1)
        for (source, start, size), part in zip(self.pieces, parts, strict=True):
            if source is not None:
                sums[source].narrow(1, start, size).add_(part)

    def dense(self, per_window: Tensor | None) -> Tensor | None:
        """The values (B, n_writes, W) of these windows' entries, spread over the shared entries (B, P, L); 0 elsewhere."""
        if per_window is None:
            return None
        values = accumulation(per_window[:, self.writes])
        spread = values.new_zeros(len(values), *self.layout.hidden.shape[1:])
        return spread.scatter_(2, self.layout.index.expand_as(values), values)


def runs(tokens: Tensor, slots: Tensor | None, window: WindowSpec, timeline: Sequence[int]) -> Iterator[Run]:
    """The writes of a call, at most WRITES_PER_PRODUCT at a time, oldest first."""
    first_write, n_writes, group, first_step, first_slot = timeline
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    for begin in range(0, n_writes, WRITES_PER_PRODUCT):
        end = min(begin + WRITES_PER_PRODUCT, n_writes)
        first, last = first_write + begin, first_write + end - 1
        start, stop = window.visible_tokens(window.write_step(first))[0], window.visible_tokens(window.write_step(last))[1]
        pieces = _pieces(0, start - first_step, stop - first_step, tokens.shape[1])
        if slots is not None:
            start, stop = window.pooled_slots(first, group)[0], window.pooled_slots(last, group)[1]
            pieces = _pieces(1, start - first_slot, stop - first_slot, slots.shape[1]) + pieces
        exists = tuple((piece.source is not None, piece.size) for piece in pieces)
        # Layouts repeat from group to group, so that a long training run meets a handful of them.
        layout = layout_of.__wrapped__ if _is_capturing(tokens) else layout_of
        key = window, first % group, end - begin, group, slots is not None, exists, dtype, tokens.device
        yield Run(slice(begin, end), pieces, layout(*key))


def _pieces(source: int, start: int, stop: int, length: int) -> list[_Piece]:
    """Entries [start, stop) of a source that holds [0, length)."""
    held_start = min(max(start, 0), stop)
    held_stop = max(min(stop, length), held_start)
    pieces = [
        _Piece(None, start, held_start - start),
        _Piece(source, held_start, held_stop - held_start),
        _Piece(None, held_stop, stop - held_stop),
    ]
    return [piece for piece in pieces if piece.size]


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph records this call: what it allocates belongs to the graph and must not be kept for other calls."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def layout_of(
    window: WindowSpec,
    first_write: int,
    n_writes: int,
    group: int,
    with_slots: bool,
    exists: tuple[tuple[bool, int], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Layout:
    """The layout of ``n_writes`` writes from ``first_write`` on, over entries that ``exists`` tells as (whether, how many)."""
    write = torch.arange(first_write, first_write + n_writes, device=device)
    start, _ = window.visible_tokens(window.write_step(write))
    index = (start - start[0])[:, None] + torch.arange(window.n_tokens, device=device)
    if with_slots:
        start, stop = window.pooled_slots(write, group)
        in_slots = (start - start[0])[:, None] + torch.arange(window.n_memory, device=device)
        index = torch.cat([in_slots, index + (stop[-1] - start[0])], dim=1)
    held = torch.cat([torch.full((size,), whether, device=device) for whether, size in exists])
    inside = torch.zeros(n_writes, len(held), dtype=torch.bool, device=device).scatter_(1, index, True)
    seen = held & inside
    return Layout(*visibility(seen[None], dtype), index[None])
