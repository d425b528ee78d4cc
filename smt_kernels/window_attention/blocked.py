"""Window attention as batched matrix products in plain PyTorch, with its own backward; runs on any device.

A window is small enough that its whole score matrix is one block, so the only decisions are to compute the scores in fp32
whatever the input, and to keep the log-sum-exp instead of the weights for the backward pass:

    P = exp(S - lse);  dV = P^T dO;  dS = P * (dO V^T - rowsum(dO * O));  dQ = scale dS K;  dK = scale dS^T Q
"""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels.window import WindowSpec


def forward(
    q: Tensor, k: Tensor, v: Tensor, valid_memory: Tensor | None, valid_tokens: Tensor | None, n_memory: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q (N, T, H, D), k, v (N, W, H_kv, D) -> out (N, T, H, D), lse (N, H, T) in fp32 (or fp64), -inf where nothing is seen."""
    k, v = _existing(k, v, valid_memory, valid_tokens, n_memory)
    scores = _scores(q, k, valid_memory, valid_tokens, n_memory, scale)
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - _finite(lse)[..., None])
    out = weights @ _by_kv_head(v)
    return _from_groups(out, q).to(q.dtype), lse.flatten(1, 2).reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    valid_memory: Tensor | None,
    valid_tokens: Tensor | None,
    n_memory: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (N, T, H, D), k and v (N, W, H_kv, D), each in the dtype of its input."""
    n_kv_heads = k.shape[2]
    k, v = _existing(k, v, valid_memory, valid_tokens, n_memory)
    scores = _scores(q, k, valid_memory, valid_tokens, n_memory, scale)
    weights = torch.exp(scores - _finite(lse).reshape(*scores.shape[:3], 1))
    grad, values = _by_group(grad_out, n_kv_heads), _by_kv_head(v)
    delta = (grad * _by_group(out, n_kv_heads)).sum(-1, keepdim=True)
    grad_scores = weights * (grad @ values.mT - delta) * scale
    dq = _from_groups(grad_scores @ _by_kv_head(k), q)
    dk = grad_scores.mT @ _by_group(q, n_kv_heads)
    dv = weights.mT @ grad
    return dq.to(q.dtype), dk.transpose(1, 2).contiguous().to(k.dtype), dv.transpose(1, 2).contiguous().to(v.dtype)


def _existing(
    k: Tensor, v: Tensor, valid_memory: Tensor | None, valid_tokens: Tensor | None, n_memory: int
) -> tuple[Tensor, Tensor]:
    """k and v with zeros instead of what does not exist: a weight of 0 times nan is nan."""
    if valid_memory is None and valid_tokens is None:
        return k, v
    spec = WindowSpec(n_memory, k.shape[1] - n_memory, stride=None)
    absent = ~spec.entry_exists(valid_memory, valid_tokens, k.device)[:, :, None, None]
    return k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)


def _scores(
    q: Tensor, k: Tensor, valid_memory: Tensor | None, valid_tokens: Tensor | None, n_memory: int, scale: float
) -> Tensor:
    """Scaled scores (N, H_kv, H / H_kv * T, W), -inf where an entry is not visible."""
    n_queries, window, n_kv_heads = q.shape[1], k.shape[1], k.shape[2]
    spec = WindowSpec(n_memory, window - n_memory, stride=None)
    visible = spec.window_visible(n_queries, valid_memory, valid_tokens, q.device)[:, None]
    scores = _by_group(q, n_kv_heads) @ _by_kv_head(k).mT * scale
    return scores.masked_fill_(~visible.repeat(1, 1, q.shape[2] // n_kv_heads, 1), float("-inf"))


def _finite(lse: Tensor) -> Tensor:
    """The log-sum-exp with 0 where nothing is seen, so that exp(-inf - lse) is 0 there and not nan."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _accumulation(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_kv_head(x: Tensor) -> Tensor:
    """(N, W, H_kv, D) -> (N, H_kv, W, D) in the accumulation dtype."""
    return _accumulation(x.transpose(1, 2))


def _by_group(x: Tensor, n_kv_heads: int) -> Tensor:
    """(N, T, H, D) -> (N, H_kv, H / H_kv * T, D): the queries that share a key/value head side by side."""
    n_windows, n_queries, n_heads, head_dim = x.shape
    heads_first = _accumulation(x.transpose(1, 2))
    return heads_first.reshape(n_windows, n_kv_heads, n_heads // n_kv_heads * n_queries, head_dim)


def _from_groups(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_by_group``, contiguous in the shape of ``like`` (N, T, H, D)."""
    n_windows, n_queries, n_heads, head_dim = like.shape
    return x.reshape(n_windows, n_heads, n_queries, head_dim).transpose(1, 2).contiguous()
