"""The definition of window attention, in plain PyTorch: any floating dtype, differentiable, no cleverness."""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels.operators import unaffected_by_autocast
from smt_kernels.window import WindowSpec


@unaffected_by_autocast
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, n_memory: int, valid_memory: Tensor | None, valid_tokens: Tensor | None, scale: float
) -> Tensor:
    """q (N, T, H, D) are the last T of W entries; k, v (N, W, H_kv, D). Returns (N, T, H, D). See the package docstring."""
    n_queries, window = q.shape[1], k.shape[1]
    spec = WindowSpec(n_memory, window - n_memory, stride=None)
    visible = spec.window_visible(n_queries, valid_memory, valid_tokens, q.device)[:, None]  # (N or 1, 1, T, W)
    # Zeros instead of what does not exist: a weight of 0 times nan is nan.
    absent = ~spec.entry_exists(valid_memory, valid_tokens, q.device)[:, :, None, None]
    group = q.shape[2] // k.shape[2]
    k, v = (x.masked_fill(absent, 0.0).repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("nihd,njhd->nhij", q, k) * scale
    # The lowest finite number instead of -inf: a query that sees nothing must give zeros, not nan.
    weights = torch.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1)
    return torch.einsum("nhij,njhd->nihd", weights * visible, v).contiguous()
