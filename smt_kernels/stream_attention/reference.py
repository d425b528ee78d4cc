"""The definition of stream attention, in plain PyTorch: any floating dtype, differentiable, no cleverness."""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels.operators import unaffected_by_autocast
from smt_kernels.window import WindowSpec


@unaffected_by_autocast
def stream_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    *,
    window: WindowSpec,
    scale: float,
    first_step: int,
    first_slot: int,
) -> Tensor:
    """q (B, T, H, D), k, v (B, S, H_kv, D), memory (B, K, H_kv, D). Returns (B, T, H, D). See the package docstring."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    key_step = first_step + torch.arange(n_keys, device=q.device)
    query_step = key_step[n_keys - n_queries :]
    visible = window.token_visible(query_step, key_step)
    if memory_k is not None:
        slot = first_slot + torch.arange(memory_k.shape[1], device=q.device)
        visible = torch.cat([window.slot_visible(query_step, slot), visible], dim=1)
        k, v = torch.cat([memory_k, k], dim=1), torch.cat([memory_v, v], dim=1)
    # Zeros instead of what no query sees: a weight of 0 times nan is nan.
    unseen = ~visible.any(dim=0)[:, None, None]
    group = q.shape[2] // k.shape[2]
    k, v = (x.masked_fill(unseen, 0.0).repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)  # a query always sees itself
    return torch.einsum("bhij,bjhd->bihd", weights, v).contiguous()
