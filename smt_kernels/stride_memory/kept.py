"""What ``stride_memory`` keeps, by backend: activations of all groups, time first, so that rows of a group lie together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smt_kernels.kept import Layout, Part
from smt_kernels.precision import accumulation_dtype
from smt_kernels.stride_memory.reference import Group, Pass
from smt_kernels.stride_write.kept import CHUNK


class Kept(NamedTuple):
    """Of the kernels in the dtype of tokens, but for x, projected and starts; of plain PyTorch in the accumulation dtype."""

    mean: Tensor  # (K, B, d); it, query and u_pool are of pooling
    query: Tensor  # (K, B, d_k)
    u_pool: Tensor  # (K, B, d)
    slots: Tensor  # (n + K, B, d), the old ones and the new ones; empty where no slots are pooled
    x: Tensor  # (L + 1, K, B, d), before each layer and after the last
    normed: Tensor  # (L, K, B, d); of plain PyTorch without the norm's weight
    xz: Tensor  # (L, K, B, 2 E), what goes into the convolution, and z
    y: Tensor  # (L, K, B, E)
    starts: Tensor  # (L, chunks, B, N, E), the SSM states before each chunk of a group
    u: Tensor  # (L, K, B, E); from here on as ``stride_write`` keeps them
    projected: Tensor  # (L, K, B, R + 2 N)
    dt_product: Tensor  # (L, K, B, E); of the kernels alone
    inputs: Tensor  # (L, K + (C - 1) groups, B, E); the last five of plain PyTorch alone
    conv: Tensor  # (L, K, B, E)
    dt_input: Tensor  # (L, K, B, E)
    dt: Tensor  # (L, K, B, E)
    inner: Tensor  # (L, K, B, E)


def chunks_of(groups: list[Group]) -> list[slice]:
    """Which chunks of the scan each group has."""
    chunks, start = [], 0
    for group in groups:
        stop = start - -len(group.writes) // CHUNK
        chunks.append(slice(start, stop))
        start = stop
    return chunks


def layout(backend: str, run: Pass) -> Layout[Kept]:
    """How it lies in a buffer of the accumulation dtype."""
    tokens, weights, groups = run.tokens, run.weights, run.groups()
    batch, _, width = tokens.shape
    layers, inner, n_state = weights.a.shape
    writes, taps, wide_dtype = run.timeline.n_writes, weights.conv_weight.shape[2], accumulation_dtype(tokens.dtype)
    fused = backend == "triton"
    dtype = tokens.dtype if fused else wide_dtype

    def part(*shape: int, dtype: torch.dtype = dtype) -> Part:
        return Part(shape, dtype)

    def of_layers(size: int, dtype: torch.dtype = dtype) -> Part:
        return part(layers, writes, batch, size, dtype=dtype)

    nothing = part(0)
    parts = Kept(
        mean=part(writes, batch, width),
        query=part(writes, batch, len(weights.w_q)),
        u_pool=part(writes, batch, width),
        slots=nothing if run.slots is None else part(run.n_slots + writes, batch, width),
        x=part(layers + 1, writes, batch, width, dtype=wide_dtype),
        normed=of_layers(width),
        xz=of_layers(2 * inner),
        y=of_layers(inner),
        starts=part(layers, chunks_of(groups)[-1].stop, batch, n_state, inner, dtype=wide_dtype),
        u=of_layers(inner),
        projected=of_layers(weights.x_proj.shape[1], dtype=wide_dtype),
        dt_product=of_layers(inner) if fused else nothing,
        inputs=nothing if fused else part(layers, writes + (taps - 1) * len(groups), batch, inner),
        conv=nothing if fused else of_layers(inner),
        dt_input=nothing if fused else of_layers(inner),
        dt=nothing if fused else of_layers(inner),
        inner=nothing if fused else of_layers(inner),
    )
    return Layout(Kept, parts._asdict(), wide_dtype)


def weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """That of a weight of every layer, over all writes and rows: (L, K, B, out) and (L, K, B, in) -> (L, out, in)."""
    return torch.bmm(grad.flatten(1, 2).mT, rows.flatten(1, 2))
