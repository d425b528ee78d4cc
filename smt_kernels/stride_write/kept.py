"""What a forward pass keeps for its backward pass, so that nothing of the size of x is computed again: views of one buffer.

Apart from the implementations, because the size of the buffer is asked for where triton may not be installed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from smt_kernels.precision import accumulation_dtype


class Kept(NamedTuple):
    """Of the kernels: in the dtype of x and contiguous. Where the gate is off, all are 0."""

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
    return -(-batch * n_writes * (2 * width + n_projected) * x.itemsize // accumulation_dtype(x.dtype).itemsize)


class KeptBlocked(NamedTuple):
    """Of plain PyTorch: in the accumulation dtype, each row's gated-on writes first."""

    inputs: Tensor  # (C - 1 + K, B, E), the conv state and then x
    conv: Tensor  # (K, B, E)
    u: Tensor  # (K, B, E)
    projected: Tensor  # (K, B, R + 2 N): low, b, c
    dt_input: Tensor  # (K, B, E), before the softplus
    dt: Tensor  # (K, B, E)
    inner: Tensor  # (K, B, E), c . h + d u

    @classmethod
    def views(cls, buffer: Tensor, x: Tensor, conv_state: Tensor, n_projected: int) -> KeptBlocked:
        """``buffer``, of ``kept_size_blocked`` elements, cut into its parts."""
        batch, n_writes, width = x.shape
        like_x = n_writes, batch, width
        inputs, projected = (n_writes + conv_state.shape[2], batch, width), (n_writes, batch, n_projected)
        shapes = cls(inputs, like_x, like_x, projected, like_x, like_x, like_x)
        parts = buffer.split([math.prod(shape) for shape in shapes])
        return cls(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


def kept_size_blocked(x: Tensor, conv_state: Tensor, n_projected: int) -> int:
    """Elements that ``forward`` keeps for ``backward``; ``n_projected`` is R + 2 N."""
    batch, n_writes, width = x.shape
    return batch * (n_writes * (6 * width + n_projected) + conv_state.shape[2] * width)


KEPT_SIZE = {"blocked": kept_size_blocked, "triton": kept_size}
