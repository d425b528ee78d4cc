"""What ``stride_write`` keeps, by backend: nothing of the size of x is computed again backward but softplus and SiLU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smt_kernels.kept import Layout, Part
from smt_kernels.precision import accumulation_dtype

# Most writes that one program of the scan walks over, and whose states are in memory at a time.
CHUNK = 32


class Kept(NamedTuple):
    """Of the kernels; time comes first. Where the gate is off, all but ``starts`` are 0."""

    u: Tensor  # (K, B, E) in the dtype of x
    dt_product: Tensor  # (K, B, E) in the dtype of x, W_dt low
    projected: Tensor  # (K, B, R + 2 N), W_x u: low, b, c
    starts: Tensor  # (chunks, B, N, E), the states before each chunk of more than one


class KeptBlocked(NamedTuple):
    """Of plain PyTorch: in the accumulation dtype, each row's gated-on writes first."""

    inputs: Tensor  # (C - 1 + K, B, E), the conv state and then x
    conv: Tensor  # (K, B, E)
    u: Tensor  # (K, B, E)
    projected: Tensor  # (K, B, R + 2 N): low, b, c
    dt_input: Tensor  # (K, B, E), before the softplus
    dt: Tensor  # (K, B, E)
    inner: Tensor  # (K, B, E), c . h + d u
    starts: Tensor  # (chunks, B, N, E), the states before each chunk of more than one


def layout(backend: str, x: Tensor, conv_state: Tensor, n_projected: int, n_state: int) -> Layout[Kept] | Layout[KeptBlocked]:
    """How it lies in a buffer of the accumulation dtype; ``n_projected`` is R + 2 N."""
    (batch, n_writes, width), wide = x.shape, accumulation_dtype(x.dtype)
    n_chunks = -(-n_writes // CHUNK) if n_writes > CHUNK else 0
    starts = Part((n_chunks, batch, n_state, width), wide)
    if backend == "triton":
        like_x = Part((n_writes, batch, width), x.dtype)
        projected = Part((n_writes, batch, n_projected), torch.float32)
        return Layout(Kept, Kept(like_x, like_x, projected, starts)._asdict(), wide)
    like_x = Part((n_writes, batch, width), wide)
    inputs = Part((n_writes + conv_state.shape[2], batch, width), wide)
    projected = Part((n_writes, batch, n_projected), wide)
    parts = KeptBlocked(inputs, like_x, like_x, projected, like_x, like_x, like_x, starts)
    return Layout(KeptBlocked, parts._asdict(), wide)
