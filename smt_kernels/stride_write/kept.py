"""What the forward pass in Triton keeps for the backward pass: u and both products, so that neither is computed again.

In a module of its own, because its size is asked for where triton may not be installed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """Views of one buffer, in the dtype of x and contiguous. Where the gate is off, all are 0."""

    u: Tensor  # (B, K, E)
    dt_product: Tensor  # (B, K, E), W_dt low
    projected: Tensor  # (B, K, R + 2 N), W_x u: low, b, c

    @classmethod
    def views(cls, buffer: Tensor, x: Tensor, n_projected: int) -> Kept:
        """``buffer``, of ``kept_size`` elements, cut into its parts."""
        batch, n_writes, _ = x.shape
        shapes = cls(x.shape, x.shape, (batch, n_writes, n_projected))
        sizes = [math.prod(shape) for shape in shapes]
        parts = buffer.view(x.dtype)[: sum(sizes)].split(sizes)
        return cls(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


def kept_size(x: Tensor, conv_state: Tensor, n_projected: int) -> int:
    """Elements of float32 that hold what ``forward`` keeps for ``backward``; ``n_projected`` is R + 2 N."""
    batch, n_writes, width = x.shape
    return -(-batch * n_writes * (2 * width + n_projected) * x.itemsize // torch.float32.itemsize)
