"""The definition of a decoding step of stream attention, in plain PyTorch: any floating dtype, no cleverness."""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels.operators import unaffected_by_autocast


@unaffected_by_autocast
def stream_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    *,
    n_tokens: Tensor,
    n_slots: Tensor,
    scale: float,
) -> Tensor:
    """q (B, H, D), k, v (B, M, H_kv, D), memory (B, N, H_kv, D), counts (B,). Returns (B, H, D). See the package docstring."""
    slot_exists = torch.arange(memory_k.shape[1], device=q.device) < n_slots[:, None]
    token_exists = torch.arange(k.shape[1], device=q.device) < n_tokens[:, None]
    exists = torch.cat([slot_exists, token_exists], dim=1)[:, :, None]  # (B, N + M, 1)
    group = q.shape[1] // k.shape[2]
    # Zeros instead of what does not exist: a weight of 0 times nan is nan.
    keys, values = (
        torch.cat(halves, dim=1).masked_fill(~exists[..., None], 0.0).repeat_interleave(group, dim=2)
        for halves in ((memory_k, k), (memory_v, v))
    )
    scores = torch.einsum("bhd,bjhd->bjh", q, keys) * scale
    # The lowest finite number instead of -inf: a query that sees nothing must give zeros, not nan.
    weights = torch.softmax(scores.masked_fill(~exists, torch.finfo(scores.dtype).min), dim=1)
    return torch.einsum("bjh,bjhd->bhd", weights * exists, values)
