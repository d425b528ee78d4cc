"""One decoding step of stream attention as one call of PyTorch's attention on [slots | tokens]; runs on any device.

A step is so little work that on a CPU its time is the number of operations it calls. So rings that hold equally many entries in
all rows, as full ones do, are cut to these entries instead of masked. Other devices are not asked how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from smt_kernels.checks import readable
from smt_kernels.operators import unaffected_by_autocast


@unaffected_by_autocast
def forward(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, n_tokens: Tensor, n_slots: Tensor, scale: float
) -> Tensor:
    """Returns (B, H, D), differentiable in all tensors; arguments as in the package docstring."""
    tokens, ragged_tokens = _extent(n_tokens, k.shape[1])
    slots, ragged_slots = _extent(n_slots, memory_k.shape[1])
    if tokens + slots == 0:
        tokens, ragged_tokens = 1, True  # one hidden entry gives zeros, and gradients of zero
    keys, values = _joined(memory_k, k, slots, tokens), _joined(memory_v, v, slots, tokens)
    exists = None
    if ragged_tokens or ragged_slots:
        halves = ((slots, n_slots), (tokens, n_tokens))
        exists = torch.cat([torch.arange(size, device=q.device) < count[:, None] for size, count in halves], dim=1)
        # Zeros instead of what does not exist: the mask is added to scores and multiplies values, where a nan would stay one.
        keys, values = (x.masked_fill(~exists[:, :, None, None], 0.0) for x in (keys, values))
        exists = exists[:, None, None]
    # The query heads that share a key/value head are the rows of one attention problem.
    queries = q.unflatten(1, (k.shape[2], -1))
    out = scaled_dot_product_attention(queries, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=exists, scale=scale)
    return out.flatten(1, 2)


def _extent(counts: Tensor, size: int) -> tuple[int, bool]:
    """How many entries to look at, and whether rows may hold fewer than that."""
    if size == 0:
        return 0, False
    if not readable(counts):
        return size, True
    values = counts.tolist()
    return max(values), min(values) < max(values)


def _joined(memory: Tensor, tokens: Tensor, n_slots: int, n_tokens: int) -> Tensor:
    """The first entries of both rings, (B, n_slots + n_tokens, H_kv, D): a view where one is empty."""
    memory = memory if n_slots == memory.shape[1] else memory[:, :n_slots]
    tokens = tokens if n_tokens == tokens.shape[1] else tokens[:, :n_tokens]
    return torch.cat([memory, tokens], dim=1) if n_slots and n_tokens else memory if n_slots else tokens
