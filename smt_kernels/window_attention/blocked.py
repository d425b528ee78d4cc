"""Window attention as batched matrix products in plain PyTorch, with its own backward; runs on any device.

A window is small enough that its whole score matrix is one block, so what is left to do here is who sees whom and the layout:
the query heads that share a key/value head are the rows of one product. ``smt_kernels.dense_attention`` has the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels.dense_attention import attend, attend_backward
from smt_kernels.precision import accumulation, accumulation_dtype
from smt_kernels.window import WindowSpec


def forward(
    q: Tensor, k: Tensor, v: Tensor, valid_memory: Tensor | None, valid_tokens: Tensor | None, n_memory: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q (N, T, H, D), k, v (N, W, H_kv, D) -> out (N, T, H, D), lse (N, H, T) in fp32 (or fp64), -inf where nothing is seen."""
    k, v, bias = _existing(q, k, v, valid_memory, valid_tokens, n_memory)
    out, lse = attend(_by_group(q, k.shape[2]), _by_kv_head(k), _by_kv_head(v), bias, scale, fused=False)
    return _from_groups(out, q).to(q.dtype), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid_memory: Tensor | None,
    valid_tokens: Tensor | None,
    n_memory: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (N, T, H, D), k and v (N, W, H_kv, D), each in the dtype of its input."""
    n_kv_heads = k.shape[2]
    k, v, bias = _existing(q, k, v, valid_memory, valid_tokens, n_memory)
    grad, queries, of_out = (_by_group(x, n_kv_heads) for x in (grad_out, q, out))
    of_lse = lse.reshape(queries.shape[:3])
    grads = attend_backward(grad, queries, _by_kv_head(k), _by_kv_head(v), of_out, of_lse, bias, scale, fused=False)
    dk, dv = (x.transpose(1, 2).contiguous().to(k.dtype) for x in grads[1:])
    return _from_groups(grads[0], q).to(q.dtype), dk, dv


def _existing(
    q: Tensor, k: Tensor, v: Tensor, valid_memory: Tensor | None, valid_tokens: Tensor | None, n_memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """k and v with zeros instead of what does not exist, as a weight of 0 times nan is nan; and what to add to the scores."""
    spec = WindowSpec(n_memory, k.shape[1] - n_memory, stride=None)
    if valid_memory is not None or valid_tokens is not None:
        absent = ~spec.entry_exists(valid_memory, valid_tokens, k.device)[:, :, None, None]
        k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
    hidden = ~spec.window_visible(q.shape[1], valid_memory, valid_tokens, q.device)[:, None]
    bias = torch.zeros(hidden.shape, dtype=accumulation_dtype(q.dtype), device=q.device).masked_fill_(hidden, float("-inf"))
    return k, v, bias.repeat(1, 1, q.shape[2] // k.shape[2], 1)  # (N or 1, 1, H / H_kv * T, W)


def _by_kv_head(x: Tensor) -> Tensor:
    """(N, W, H_kv, D) -> (N, H_kv, W, D) in the accumulation dtype."""
    return accumulation(x.transpose(1, 2))


def _by_group(x: Tensor, n_kv_heads: int) -> Tensor:
    """(N, T, H, D) -> (N, H_kv, H / H_kv * T, D): the queries that share a key/value head side by side."""
    n_windows, n_queries, n_heads, head_dim = x.shape
    heads_first = accumulation(x.transpose(1, 2))
    return heads_first.reshape(n_windows, n_kv_heads, n_heads // n_kv_heads * n_queries, head_dim)


def _from_groups(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_by_group``, contiguous in the shape of ``like`` (N, T, H, D)."""
    n_windows, n_queries, n_heads, head_dim = like.shape
    return x.reshape(n_windows, n_heads, n_queries, head_dim).transpose(1, 2).contiguous()
