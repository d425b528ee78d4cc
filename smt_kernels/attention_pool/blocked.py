"""Attention pooling as a few batched matrix products in plain PyTorch, with its own backward; runs on any device.

P neighbouring windows, a *run*, are pooled as dense products over the L entries x (L, d) that they share, so that overlapping
windows are never stored. With r_i = rsqrt(mean(x_i^2) + eps) as a factor of the coefficients, neither are the normalised
entries r_i x_i:

    mean = (E r) X;   u = W_k^T W_q mean;   A = softmax(r (u X^T) / sqrt(d_k) + hidden);   pooled = (A dropout r) X

E holds 1 / (number of entries) where a window sees an entry, ``hidden`` -inf where it does not. Backward, with
dS = softmax'(A, dropout r (dpooled X^T) + dA) r / sqrt(d_k):

    du = dS X;   Y = (A dropout r)^T dpooled + dS^T u + (E r)^T dmean;   dX = Y - X r^2 (X . Y) / d
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from smt_kernels.attention_pool.reference import Inputs, Kept, Timeline
from smt_kernels.precision import NORM_EPS, accumulation, accumulation_dtype
from smt_kernels.window import WindowSpec

# Writes per dense product of a long call: with more, more of a product falls on entries that the window does not see;
# with fewer, more entries are shared by two products and more operations are launched.
WRITES_PER_PRODUCT = 16


def forward(inputs: Inputs, window: WindowSpec, timeline: Timeline, normalise: bool) -> tuple[Tensor, Kept]:
    """Returns pooled (B, n_writes, d) and what ``backward`` needs."""
    w_q, w_k = accumulation(inputs.w_q), accumulation(inputs.w_k)
    pooled, kept = [], []
    for run in _runs(inputs, window, timeline):
        x, layout, dropout = run.gather(inputs), run.layout, run.dense(inputs.dropout)
        of_run, kept_of_run = _pool(x, w_q, w_k, layout.average, layout.hidden, dropout, normalise)
        pooled.append(of_run.to(inputs.tokens.dtype))
        kept.append(kept_of_run._replace(weights=run.per_window(kept_of_run.weights)))
    if len(pooled) == 1:
        return pooled[0], kept[0]
    return torch.cat(pooled, dim=1), Kept(*(torch.cat(parts, dim=1) for parts in zip(*kept, strict=True)))


def backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    kept: Kept,
    inputs: Inputs,
    window: WindowSpec,
    timeline: Timeline,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens (B, T, d), slots (B, K, d; empty for None), w_q and w_k (d_k, d), each in the dtype of its input."""
    tokens, slots = inputs.tokens, inputs.slots
    d_tokens, d_slots = (None if t is None else t.new_zeros(t.shape, dtype=kept.u.dtype) for t in (tokens, slots))
    d_query, du = entries_backward(grad_pooled, grad_weights, kept, inputs, window, timeline, normalise, d_tokens, d_slots)
    dw_q, dw_k = d_query.flatten(0, 1).T @ kept.mean.flatten(0, 1), kept.query.flatten(0, 1).T @ du.flatten(0, 1)
    d_slots = tokens.new_empty(0) if slots is None else d_slots
    return tuple(total.to(tokens.dtype) for total in (d_tokens, d_slots, dw_q, dw_k))


def entries_backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    kept: Kept,
    inputs: Inputs,
    window: WindowSpec,
    timeline: Timeline,
    normalise: bool,
    d_tokens: Tensor,
    d_slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add to d_tokens (B, T, d) and d_slots (B, K, d), in the accumulation dtype; returns the gradients of query and u."""
    projections = accumulation(inputs.w_q), accumulation(inputs.w_k)
    found = []
    for run in _runs(inputs, window, timeline):
        grads = accumulation(grad_pooled[:, run.writes]), run.dense(grad_weights), run.dense(inputs.dropout)
        of_run = Kept(run.dense(kept.weights), *(part[:, run.writes] for part in kept[1:]))
        dx, *of_windows = _pool_backward(*grads, run.gather(inputs), *projections, run.layout.average, of_run, normalise)
        run.add_back(dx, d_tokens, d_slots)
        found.append(of_windows)
    d_query, du = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return d_query, du


def _pool(
    x: Tensor, w_q: Tensor, w_k: Tensor, average: Tensor, hidden: Tensor, dropout: Tensor | None, normalise: bool
) -> tuple[Tensor, Kept]:
    """x (B, L, d), average, hidden (B or 1, P, L) or smaller, dropout (B, P, L) -> pooled (B, P, d) and what backward needs."""
    inverse = _inverse_rms(x, normalise)
    mean = torch.matmul(average * inverse, x)
    query = mean @ w_q.T
    u = query @ w_k
    scores = torch.addcmul(hidden, torch.bmm(u, x.mT), inverse, value=w_q.shape[0] ** -0.5)
    weights = torch.softmax(scores, dim=-1)
    used = weights * inverse
    if dropout is not None:
        used.mul_(dropout)
    return torch.bmm(used, x), Kept(weights, mean, query, u)


def _pool_backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    dropout: Tensor | None,
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    average: Tensor,
    kept: Kept,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, L, d), query and u from those of pooled (B, P, d) and weights (B, P, L)."""
    weights, u = kept.weights, kept.u
    inverse = _inverse_rms(x, normalise)
    factor = inverse if dropout is None else dropout * inverse
    d_weights = torch.bmm(grad_pooled, x.mT).mul_(factor)
    if grad_weights is not None:
        d_weights.add_(grad_weights)
    d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    d_scores.mul_(inverse * w_q.shape[0] ** -0.5)
    du = torch.bmm(d_scores, x)
    d_query = du @ w_k.T
    d_mean = d_query @ w_q
    dx = torch.bmm((weights * factor).mT, grad_pooled).baddbmm_(d_scores.mT, u)
    dx.baddbmm_((average * inverse).expand_as(weights).mT, d_mean)
    if normalise:
        along = torch.linalg.vecdot(x, dx)[:, None].mul_(inverse).mul_(inverse)
        dx.addcmul_(x, along.mT, value=-1.0 / x.shape[-1])
    return dx, d_query, du


def _inverse_rms(x: Tensor, normalise: bool) -> Tensor:
    """The factor (B, 1, L) that normalises each entry of x (B, L, d); a single 1 without normalisation."""
    if not normalise:
        return x.new_ones(1, 1, 1)
    return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()[:, None]


class _Piece(NamedTuple):
    """``size`` consecutive entries of source 0 (tokens) or 1 (slots) from ``start`` on; of None: entries that do not exist."""

    source: int | None
    start: int
    size: int


class Layout(NamedTuple):
    """Which of the L entries that P windows share each of them sees."""

    average: Tensor  # (B or 1, P, L), 1 / (number of entries) where one is seen
    hidden: Tensor  # (B or 1, P, L), -inf where one is not
    index: Tensor | None  # (1, P, W), where entry i of a window lies among the L; None: where it is, of a single window


class Run(NamedTuple):
    """The consecutive writes ``writes`` of a call, pooled together, and the entries that they share: slots, then tokens."""

    writes: slice
    pieces: list[_Piece]
    layout: Layout

    def gather(self, inputs: Inputs) -> Tensor:
        """The shared entries (B, L, d) in the accumulation dtype, zeros where they do not exist."""
        sources, (batch, _, width) = inputs[:2], inputs.tokens.shape
        parts = [
            inputs.tokens.new_zeros(batch, size, width) if source is None else sources[source].narrow(1, start, size)
            for source, start, size in self.pieces
        ]
        x = accumulation(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        return x if inputs.exists is None else x.masked_fill(~inputs.exists[..., None], 0.0)

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
        if self.layout.index is None:
            return values
        spread = values.new_zeros(len(values), *self.layout.hidden.shape[1:])
        return spread.scatter_(2, self.layout.index.expand_as(values), values)

    def per_window(self, dense: Tensor) -> Tensor:
        """The inverse of ``dense``, (B, P, W)."""
        index = self.layout.index
        return dense if index is None else dense.gather(2, index.expand(len(dense), -1, -1))


def _runs(inputs: Inputs, window: WindowSpec, timeline: Timeline) -> Iterator[Run]:
    """The writes of a call, at most WRITES_PER_PRODUCT at a time, oldest first."""
    first_write, n_writes, group, first_step, first_slot = timeline
    tokens, slots, dtype = inputs.tokens, inputs.slots, accumulation_dtype(inputs.tokens.dtype)
    for begin in range(0, n_writes, WRITES_PER_PRODUCT):
        end = min(begin + WRITES_PER_PRODUCT, n_writes)
        first, last = first_write + begin, first_write + end - 1
        start, stop = window.visible_tokens(window.write_step(first))[0], window.visible_tokens(window.write_step(last))[1]
        pieces = _pieces(0, start - first_step, stop - first_step, tokens.shape[1])
        if slots is not None:
            start, stop = window.pooled_slots(first, group)[0], window.pooled_slots(last, group)[1]
            pieces = _pieces(1, start - first_slot, stop - first_slot, slots.shape[1]) + pieces
        if inputs.exists is not None:  # of windows that are given whole: a single write
            yield Run(slice(begin, end), pieces, Layout(*_visibility(inputs.exists[:, None], dtype), None))
            continue
        exists = tuple((piece.source is not None, piece.size) for piece in pieces)
        # Layouts repeat from group to group, so that a long training run meets a handful of them.
        # On a GPU they may lie in memory of a CUDA graph, whose other tensors must not outlive a call.
        layout = layout_of if tokens.device.type == "cpu" else layout_of.__wrapped__
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
    return Layout(*_visibility(seen[None], dtype), None if n_writes == 1 else index[None])


def _visibility(seen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """average and hidden of windows that see the entries ``seen`` (..., L)."""
    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return seen.to(dtype) / seen.sum(-1, keepdim=True), hidden
