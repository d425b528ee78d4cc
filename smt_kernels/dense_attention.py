"""Attention of many small blocks, each with its own queries and keys, as one operation where PyTorch has one that fuses it.

    S = scale Q K^T + bias;  P = softmax(S);  O = P V
    P = exp(S - lse);  dS = scale P * (dO V^T - rowsum(dO * O));  dQ = dS K;  dK = dS^T Q;  dV = P^T dO

On a CPU the scores of a block never leave the cache of a core that way, and each core works on blocks of its own. But the fused
operation has no results for a query that sees nothing, whose row of the bias is all -inf; the products give it zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

FUSED_ON = ("cpu",)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, *, fused: bool = True
) -> tuple[Tensor, Tensor]:
    """queries (N, H, Q, D), keys and values (N, H, K, D), bias (N or 1, 1, Q, K) -> out (N, H, Q, D), lse (N, H, Q)."""
    if fused and queries.device.type in FUSED_ON:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attention(queries, keys, values, attn_mask=bias, scale=scale)
    scores = (queries @ keys.mT).mul_(scale).add_(bias)
    lse = scores.logsumexp(-1)
    return scores.sub_(_finite(lse)).exp_() @ values, lse


def attend_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor,
    scale: float,
    *,
    fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from ``grad``, that of out."""
    if fused and queries.device.type in FUSED_ON:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return attention(grad, queries, keys, values, out, lse, 0.0, False, attn_mask=bias, scale=scale)
    weights = (queries @ keys.mT).mul_(scale).add_(bias).sub_(_finite(lse)).exp_()
    delta = (grad * out).sum(-1, keepdim=True)
    grad_scores = (grad @ values.mT).sub_(delta).mul_(weights).mul_(scale)
    return grad_scores @ keys, grad_scores.mT @ queries, weights.mT @ grad


def _finite(lse: Tensor) -> Tensor:
    """The log-sum-exp (N, H, Q, 1) with 0 where nothing is seen, so that exp(-inf - lse) is 0 there and not nan."""
    return lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
