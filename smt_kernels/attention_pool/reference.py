"""The definition of attention pooling, in plain PyTorch: any floating dtype, differentiable, no cleverness; and its terms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smt_kernels.operators import unaffected_by_autocast
from smt_kernels.precision import NORM_EPS
from smt_kernels.window import WindowSpec


class Timeline(NamedTuple):
    """Which writes of a sequence are pooled, and what its first token and slot are called."""

    first_write: int
    n_writes: int
    write_group: int
    first_step: int
    first_slot: int


class Inputs(NamedTuple):
    """The tensors that the windows are pooled from."""

    tokens: Tensor  # (B, T, d)
    slots: Tensor | None  # (B, K, d); None: the windows have tokens only
    w_q: Tensor  # (d_k, d)
    w_k: Tensor  # (d_k, d)
    exists: Tensor | None  # (B or 1, T) bool, of windows that are given whole: which of their entries exist; None: all
    dropout: Tensor | None  # (B, n_writes, W), factors of the weights; None: 1


class Kept(NamedTuple):
    """What the backward pass needs: the weights in the accumulation dtype, the others as the backend multiplies them."""

    weights: Tensor  # (B, n_writes, W)
    mean: Tensor  # (B, n_writes, d)
    query: Tensor  # (B, n_writes, d_k)
    u: Tensor  # (B, n_writes, d)


@unaffected_by_autocast
def attention_pool(
    windows: Tensor, w_q: Tensor, w_k: Tensor, exists: Tensor, *, normalise: bool, dropout_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """windows (N, W, d), w_q and w_k (d_k, d), exists (N or 1, W) bool -> pooled (N, d), weights (N, W) before dropout."""
    windows = windows.masked_fill(~exists[..., None], 0.0)  # what stands there may be anything, nan included
    if normalise:
        windows = windows * torch.rsqrt(windows.square().mean(dim=-1, keepdim=True) + NORM_EPS)
    mean = windows.sum(dim=1) / exists.sum(dim=-1, keepdim=True)
    query, keys = mean @ w_q.T, windows @ w_k.T
    scores = torch.einsum("nk,nwk->nw", query, keys) * w_q.shape[0] ** -0.5
    weights = torch.softmax(scores.masked_fill(~exists, float("-inf")), dim=-1)
    used = weights if dropout_mask is None else weights * dropout_mask
    return torch.einsum("nw,nwd->nd", used, windows), weights


@unaffected_by_autocast
def attention_pool_sequence(
    tokens: Tensor,
    slots: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    *,
    window: WindowSpec,
    timeline: Timeline,
    normalise: bool,
    dropout_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """tokens (B, T, d), slots (B, K, d) -> pooled (B, n_writes, d), weights (B, n_writes, W). See the package docstring."""
    first_write, n_writes, write_group, first_step, first_slot = timeline
    batch, _, width = tokens.shape
    pooled, weights = [], []
    for write in range(first_write, first_write + n_writes):
        step_range = window.visible_tokens(window.write_step(write))
        slot_range = window.pooled_slots(write, write_group)
        halves = [(tokens, first_step, step_range)]
        if slots is not None:
            halves = [(slots, first_slot, slot_range), *halves]
        entries, exists = [], []
        for held, first, (start, stop) in halves:
            for index in range(start, stop):
                here = first <= index < first + held.shape[1]
                entries.append(held[:, index - first] if here else held.new_zeros(batch, width))
                exists.append(here)
        mask = None if dropout_mask is None else dropout_mask[:, write - first_write]
        result = attention_pool(
            torch.stack(entries, dim=1),
            w_q,
            w_k,
            torch.tensor([exists], device=tokens.device),
            normalise=normalise,
            dropout_mask=mask,
        )
        pooled.append(result[0])
        weights.append(result[1])
    return torch.stack(pooled, dim=1), torch.stack(weights, dim=1)
