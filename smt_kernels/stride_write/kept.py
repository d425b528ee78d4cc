"""What ``stride_write`` keeps, by backend: nothing of the size of x is computed again backward but softplus and SiLU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smt_kernels.kept import Part, buffer_size, new_buffer, parts_of
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


def _parts(x: Tensor, conv_state: Tensor, n_projected: int, n_state: int) -> dict[str, Part]:
    batch, n_writes, width = x.shape
    like_x = Part((n_writes, batch, width), x.dtype)
    projected = Part((n_writes, batch, n_projected), torch.float32)
    return Kept(like_x, like_x, projected, _starts(x, n_state))._asdict()


def _parts_blocked(x: Tensor, conv_state: Tensor, n_projected: int, n_state: int) -> dict[str, Part]:
    (batch, n_writes, width), dtype = x.shape, accumulation_dtype(x.dtype)
    like_x = Part((n_writes, batch, width), dtype)
    inputs = Part((n_writes + conv_state.shape[2], batch, width), dtype)
    projected = Part((n_writes, batch, n_projected), dtype)
    return KeptBlocked(inputs, like_x, like_x, projected, like_x, like_x, like_x, _starts(x, n_state))._asdict()


def _starts(x: Tensor, n_state: int) -> Part:
    batch, n_writes, width = x.shape
    n_chunks = -(-n_writes // CHUNK) if n_writes > CHUNK else 0
    return Part((n_chunks, batch, n_state, width), accumulation_dtype(x.dtype))


_BACKENDS = {"triton": (Kept, _parts), "blocked": (KeptBlocked, _parts_blocked)}


def kept_size(backend: str, x: Tensor, conv_state: Tensor, n_projected: int, n_state: int) -> int:
    """Elements, in the accumulation dtype, of what ``forward`` keeps for ``backward``; ``n_projected`` is R + 2 N."""
    parts = _BACKENDS[backend][1](x, conv_state, n_projected, n_state)
    return buffer_size(parts, accumulation_dtype(x.dtype))


def new_kept(backend: str, x: Tensor, conv_state: Tensor, n_projected: int, n_state: int) -> tuple[Tensor, Kept | KeptBlocked]:
    """A buffer of ``kept_size`` elements, and its parts."""
    kind, parts = _BACKENDS[backend]
    found = parts(x, conv_state, n_projected, n_state)
    buffer = new_buffer(x, found, accumulation_dtype(x.dtype))
    return buffer, kind(**parts_of(buffer, found))


def kept_of(backend: str, buffer: Tensor, x: Tensor, conv_state: Tensor, n_projected: int, n_state: int) -> Kept | KeptBlocked:
    """A buffer of ``kept_size`` elements cut into its parts."""
    kind, parts = _BACKENDS[backend]
    return kind(**parts_of(buffer, parts(x, conv_state, n_projected, n_state)))
