"""Attention pooling in Triton: two launches forward, two backward, and the matrix library between them.

    mean (launch);   query = mean W_q^T;   u = query W_k;   weights and pooled (launch)
    du (launch);   dquery = du W_k^T;   dmean = dquery W_q;   dW_q = dquery^T mean;   dW_k = query^T du;   dx (launch)

Since q . (W_k x) = (W_k^T q) . x, keys are never formed, and since windows are read where they lie in the sequence, neither are
windows. Entries must be read by both launches of a direction, as u depends on the mean of all of them. Mean, query, u and their
gradients have the dtype of the entries, which is what matrix units multiply; weights and all sums inside a program are fp32.

Names in the kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block of values, with its shape behind it. P windows and
E entries are taken at a time, CHUNK of WIDTH elements of each; an entry wider than CHUNK is split over the second grid axis:
each program reads the whole width for scores and norms, and writes its own chunk of the results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from smt_kernels import checks
from smt_kernels.attention_pool.backward_kernels import entries_backward_kernel, query_backward_kernel
from smt_kernels.attention_pool.forward_kernels import mean_kernel, pool_kernel
from smt_kernels.attention_pool.settings import pool_settings
from smt_kernels.attention_pool.strips import Strips, strips_of_sequence, strips_of_windows
from smt_kernels.launch import launch
from smt_kernels.window import WindowSpec

# Windows of a strip, and entries that are multiplied at a time: the least that a dot takes, as programs hold whole entries.
WINDOWS = ENTRIES = 16


def forward(
    windows: Tensor, w_q: Tensor, w_k: Tensor, exists: Tensor | None, dropout_mask: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """windows (N, W, d), exists (N or 1, W) or None: all -> pooled (N, d), weights (N, W), mean, query and u (N, d or d_k)."""
    results = _forward(windows, None, w_q, w_k, exists, dropout_mask, strips_of_windows(windows), normalise)
    return tuple(result[:, 0] for result in results)


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
    kept = weights, mean[:, None], query[:, None], u[:, None]
    inputs = windows, None, w_q, w_k, exists, dropout_mask
    strips = strips_of_windows(windows)
    d_windows, _, dw_q, dw_k = _backward(grad_pooled[:, None], grad_weights, *inputs, *kept, strips, normalise)
    return d_windows, dw_q, dw_k


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
    """tokens (B, T, d), slots (B, K, d) or None -> pooled, weights, mean, query and u (B, n_writes, d, W, d, d_k, d).

    ``timeline`` is first_write, n_writes, write_group, first_step, first_slot.
    """
    strips = strips_of_sequence(tokens, slots, window, timeline)
    return _forward(tokens, slots, w_q, w_k, None, dropout_mask, strips, normalise)


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
    inputs = tokens, slots, w_q, w_k, None, dropout_mask
    strips = strips_of_sequence(tokens, slots, window, timeline)
    return _backward(grad_pooled, grad_weights, *inputs, weights, mean, query, u, strips, normalise)


def _forward(
    tokens: Tensor,
    slots: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    exists: Tensor | None,
    dropout_mask: Tensor | None,
    strips: Strips,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, width = strips[:2], tokens.shape[-1]
    mean, pooled = tokens.new_empty((*rows, width)), tokens.new_empty((*rows, width))
    weights = tokens.new_empty((*rows, strips.n_memory + strips.n_tokens), dtype=torch.float32)
    inputs = tokens, slots, exists, strips, normalise
    _launch(mean_kernel, *inputs, mean=mean)
    query = mean @ w_q.T
    u = query @ w_k
    _launch(pool_kernel, *inputs, u=u, dropout=_packed(dropout_mask), pooled=pooled, weights=weights, scale=len(w_q) ** -0.5)
    return pooled, weights, mean, query, u


def _backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    tokens: Tensor,
    slots: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    exists: Tensor | None,
    dropout_mask: Tensor | None,
    weights: Tensor,
    mean: Tensor,
    query: Tensor,
    u: Tensor,
    strips: Strips,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (grad_pooled,) = checks.unit_stride(grad_pooled)
    du, d_weights = torch.empty_like(u), torch.empty_like(weights)
    delta, share = (weights.new_empty(strips[:2]) for _ in range(2))
    d_tokens = tokens.new_empty(tokens.shape)
    d_slots = d_tokens if slots is None else slots.new_empty(slots.shape)  # without slots, no program takes any
    inputs = tokens, slots, exists, strips, normalise
    both = {"grad_pooled": grad_pooled, "strides_grad": grad_pooled.stride()[:2], "weights": weights, "scale": len(w_q) ** -0.5}
    both |= {"dropout": _packed(dropout_mask), "d_weights": d_weights, "delta": delta, "share": share}
    _launch(query_backward_kernel, *inputs, **both, grad_weights=_packed(grad_weights), du=du)
    d_query = du @ w_k.T
    d_mean = d_query @ w_q
    strides = {"strides_d_tokens": d_tokens.stride()[:2], "strides_d_slots": d_slots.stride()[:2]}
    _launch(entries_backward_kernel, *inputs, **both, u=u, d_mean=d_mean, d_tokens=d_tokens, d_slots=d_slots, **strides)
    dw_q, dw_k = (x.flatten(0, 1).mT @ y.flatten(0, 1) for x, y in ((d_query, mean), (query, du)))
    return d_tokens, tokens.new_empty(0) if slots is None else d_slots, dw_q, dw_k


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _launch(
    kernel: triton.JITFunction,
    tokens: Tensor,
    slots: Tensor | None,
    exists: Tensor | None,
    strips: Strips,
    normalise: bool,
    **named: object,
) -> None:
    width = tokens.shape[-1]
    settings = pool_settings(kernel.fn.__name__, width, tokens.dtype, tokens.device)
    (slots,) = checks.unit_stride(tokens if slots is None else slots)
    if kernel is entries_backward_kernel:
        blocks = triton.cdiv(strips.held_tokens, ENTRIES) + triton.cdiv(strips.held_slots, ENTRIES)
    else:
        blocks = triton.cdiv(strips.n_windows, WINDOWS)
    launch(
        kernel,
        (strips.n_rows * blocks, triton.cdiv(width, settings.head_chunk)),
        tokens.device,
        tokens=tokens,
        slots=slots,
        exists=_packed(exists),
        strides_tokens=tokens.stride()[:2],
        strides_slots=slots.stride()[:2],
        stride_exists=0 if exists is None or len(exists) == 1 else exists.shape[1],
        **dict(zip(strips._fields[1:], strips[1:], strict=True)),
        **named,
        NORMALISE=normalise,
        WIDTH=width,
        CHUNK=settings.head_chunk,
        P=WINDOWS,
        E=ENTRIES,
        **settings.options,
    )
