"""Attention pooling as a few batched matrix products in plain PyTorch, with its own backward; runs on any device.

P neighbouring windows are pooled as dense products over the L entries x (L, d) that they share, so that overlapping windows are
never stored. With r_i = rsqrt(mean(x_i^2) + eps) as a factor of the coefficients, neither are the normalised entries r_i x_i:

    mean = (E r) X;   u = W_k^T W_q mean;   A = softmax(r (u X^T) / sqrt(d_k) + hidden);   pooled = (A dropout r) X

E holds 1 / (number of entries) where a window sees an entry, ``hidden`` -inf where it does not. Backward, with
dS = softmax'(A, dropout r (dpooled X^T) + dA) r / sqrt(d_k):

    du = dS X;   Y = (A dropout r)^T dpooled + dS^T u + (E r)^T dmean;   dX = Y - X r^2 (X . Y) / d
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smt_kernels.attention_pool.reference import EPS
from smt_kernels.attention_pool.runs import accumulation, runs, visibility
from smt_kernels.window import WindowSpec


class Kept(NamedTuple):
    """What the backward pass needs of P windows per row, in fp32 (fp64 for fp64)."""

    weights: Tensor  # (B, P, W or L)
    mean: Tensor  # (B, P, d)
    query: Tensor  # (B, P, d_k)
    u: Tensor  # (B, P, d)


def forward(
    windows: Tensor, w_q: Tensor, w_k: Tensor, exists: Tensor | None, dropout_mask: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """windows (N, W, d), exists (N or 1, W) or None: all -> pooled (N, d) and, without P, what ``Kept`` holds."""
    x, average, hidden = _window_products(windows, exists)
    dropout = None if dropout_mask is None else accumulation(dropout_mask)[:, None]
    pooled, kept = _pool(x, accumulation(w_q), accumulation(w_k), average, hidden, dropout, normalise)
    return pooled[:, 0].to(windows.dtype), *(part[:, 0] for part in kept)


def backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    windows: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    exists: Tensor | None,
    dropout_mask: Tensor | None,
    weights: Tensor,
    mean: Tensor,
    query: Tensor,
    u: Tensor,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of windows (N, W, d), w_q and w_k (d_k, d), each in the dtype of its input."""
    x, average, _ = _window_products(windows, exists)
    grads = (None if t is None else accumulation(t)[:, None] for t in (grad_pooled, grad_weights, dropout_mask))
    kept = Kept(*(part[:, None] for part in (weights, mean, query, u)))
    dx, dw_q, dw_k = _pool_backward(*grads, x, accumulation(w_q), accumulation(w_k), average, kept, normalise)
    return dx.to(windows.dtype), dw_q.to(w_q.dtype), dw_k.to(w_k.dtype)


def forward_sequence(
    tokens: Tensor,
    slots: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    dropout_mask: Tensor | None,
    window: WindowSpec,
    timeline: Sequence[int],
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """tokens (B, T, d), slots (B, K, d) or None -> pooled (B, n_writes, d) and what ``Kept`` holds with P = n_writes.

    ``timeline`` is first_write, n_writes, write_group, first_step, first_slot.
    """
    w_q, w_k = accumulation(w_q), accumulation(w_k)
    results = []
    for run in runs(tokens, slots, window, timeline):
        x, layout = run.gather(tokens, slots), run.layout
        pooled, kept = _pool(x, w_q, w_k, layout.average, layout.hidden, run.dense(dropout_mask), normalise)
        weights = kept.weights.gather(2, layout.index.expand(len(x), -1, -1))
        results.append((pooled.to(tokens.dtype), weights, *kept[1:]))
    return results[0] if len(results) == 1 else tuple(torch.cat(parts, dim=1) for parts in zip(*results, strict=True))


def backward_sequence(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    tokens: Tensor,
    slots: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    dropout_mask: Tensor | None,
    weights: Tensor,
    mean: Tensor,
    query: Tensor,
    u: Tensor,
    window: WindowSpec,
    timeline: Sequence[int],
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens (B, T, d), slots (B, K, d; empty for None), w_q and w_k (d_k, d), each in the dtype of its input."""
    projections = accumulation(w_q), accumulation(w_k)
    d_tokens, d_slots = (None if t is None else t.new_zeros(t.shape, dtype=u.dtype) for t in (tokens, slots))
    d_projections = []
    for run in runs(tokens, slots, window, timeline):
        grads = accumulation(grad_pooled[:, run.writes]), run.dense(grad_weights), run.dense(dropout_mask)
        kept = Kept(run.dense(weights), *(part[:, run.writes] for part in (mean, query, u)))
        dx, dw_q, dw_k = _pool_backward(*grads, run.gather(tokens, slots), *projections, run.layout.average, kept, normalise)
        run.add_back(dx, d_tokens, d_slots)
        d_projections = [dw_q, dw_k] if not d_projections else [d_projections[0].add_(dw_q), d_projections[1].add_(dw_k)]
    d_slots = tokens.new_empty(0) if slots is None else d_slots
    return tuple(total.to(tokens.dtype) for total in (d_tokens, d_slots, *d_projections))


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
    """Gradients of x (B, L, d), w_q and w_k from those of pooled (B, P, d) and weights (B, P, L)."""
    weights, mean, query, u = kept
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
    dw_q = d_query.flatten(0, 1).T @ mean.flatten(0, 1)
    dw_k = query.flatten(0, 1).T @ du.flatten(0, 1)
    dx = torch.bmm((weights * factor).mT, grad_pooled).baddbmm_(d_scores.mT, u)
    dx.baddbmm_((average * inverse).expand_as(weights).mT, d_mean)
    if normalise:
        along = torch.linalg.vecdot(x, dx)[:, None].mul_(inverse).mul_(inverse)
        dx.addcmul_(x, along.mT, value=-1.0 / x.shape[-1])
    return dx, dw_q, dw_k


def _inverse_rms(x: Tensor, normalise: bool) -> Tensor:
    """The factor (B, 1, L) that normalises each entry of x (B, L, d); a single 1 without normalisation."""
    if not normalise:
        return x.new_ones(1, 1, 1)
    return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(EPS).rsqrt_()[:, None]


def _window_products(windows: Tensor, exists: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, W, d) with zeros for entries that do not exist, average and hidden (N or 1, 1, W) or smaller."""
    x = accumulation(windows)
    if exists is None:
        return x, x.new_full((1, 1, x.shape[1]), 1.0 / x.shape[1]), x.new_zeros(1, 1, 1)
    return x.masked_fill(~exists[..., None], 0.0), *visibility(exists[:, None], x.dtype)
