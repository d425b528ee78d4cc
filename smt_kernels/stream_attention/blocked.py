"""Stream attention over blocks of consecutive queries in plain PyTorch, with its own backward; runs on any device.

A chunk of blocks is one batch of small attention problems with [slots | tokens] as keys: see ``strips`` for what a block works
on and ``dense_attention`` for the formulas. A chunk is small enough to stay in cache; memory is linear in T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smt_kernels.dense_attention import attend, attend_backward
from smt_kernels.precision import accumulation, accumulation_dtype
from smt_kernels.stream_attention.strips import Run, runs
from smt_kernels.window import WindowSpec

# Scores per chunk: with fewer the time goes to Python, with more the keys, values and their gradients leave the cache.
CHUNK_SCORES = 2**18


@dataclass(frozen=True)
class Chunk:
    """What is computed at once: some blocks, for some batch rows and all heads."""

    run: Run
    batch: slice
    group: int  # query heads per key/value head
    bias: Tensor  # (batch * blocks or 1, 1, group * queries, keys)

    def queries(self, x: Tensor) -> Tensor:
        """The query rows of x (B, T, H, D): (batch * blocks, kv heads, group * queries, D) in the accumulation dtype."""
        x = self.run.queries.gather(x[self.batch], self.run.n_blocks).flatten(0, 1)
        if self.group > 1:
            x = x.unflatten(1, (-1, self.group)).flatten(2, 3)
        return accumulation(x)

    def set_queries(self, x: Tensor, values: Tensor) -> None:
        """The inverse of ``queries``: write the rows that exist to x (B, T, H, D)."""
        if self.group > 1:
            values = values.unflatten(2, (self.group, -1)).flatten(1, 2)
        self.run.queries.write(x[self.batch], self._by_block(values))

    def keys(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """The rows [slots | tokens] of memory and tokens: (batch * blocks, heads, keys, D) in the accumulation dtype."""
        slots = self.run.slots.gather(memory[self.batch], self.run.n_blocks)
        tokens = self.run.tokens.gather(tokens[self.batch], self.run.n_blocks)
        keys = torch.cat([slots, tokens], dim=3).flatten(0, 1)
        return accumulation(keys)

    def add_keys(self, memory: Tensor, tokens: Tensor, values: Tensor) -> None:
        """The transpose of ``keys``: add values (batch * blocks, heads, keys, D) to the rows of memory and tokens."""
        slots, values = self._by_block(values).split([self.run.slots.length, self.run.tokens.length], dim=3)
        self.run.slots.add(memory[self.batch], slots)
        self.run.tokens.add(tokens[self.batch], values)

    def _by_block(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, self.run.n_blocks))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    window: WindowSpec,
    scale: float,
    first_step: int,
    first_slot: int,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, T, H, D) and lse (B, H, T), the latter in fp32 (fp64 for fp64); arguments as in the package docstring."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulation_dtype(q.dtype))
    for chunk in _chunks(q, k, memory_k, window, first_step, first_slot):
        keys, values = chunk.keys(memory_k, k), chunk.keys(memory_v, v)
        chunk_out, chunk_lse = attend(chunk.queries(q), keys, values, chunk.bias, scale)
        chunk.set_queries(out, chunk_out)
        chunk.set_queries(_as_rows(lse), chunk_lse[..., None])
    return out, lse


def backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    window: WindowSpec,
    scale: float,
    first_step: int,
    first_slot: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, memory_k and memory_v, each in the shape and dtype of its input."""
    dq = q.new_empty(q.shape)
    dk, dv, dmemory_k, dmemory_v = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (k, v, memory_k, memory_v))
    for chunk in _chunks(q, k, memory_k, window, first_step, first_slot):
        queries, grad, of_out = (chunk.queries(x) for x in (q, grad_out, out))
        keys, values = chunk.keys(memory_k, k), chunk.keys(memory_v, v)
        # A query row that does not exist is zero in q, dO and lse: its weights are finite and it adds nothing to any gradient.
        of_lse = chunk.queries(_as_rows(lse))[..., 0]
        d_queries, d_keys, d_values = attend_backward(grad, queries, keys, values, of_out, of_lse, chunk.bias, scale)
        chunk.set_queries(dq, d_queries)
        chunk.add_keys(dmemory_k, dk, d_keys)
        chunk.add_keys(dmemory_v, dv, d_values)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dmemory_k.to(k.dtype), dmemory_v.to(v.dtype)


def _chunks(q: Tensor, k: Tensor, memory: Tensor, window: WindowSpec, first_step: int, first_slot: int) -> Iterator[Chunk]:
    """Cut the work into chunks of about ``CHUNK_SCORES`` scores: some blocks of one batch row, or all blocks of many rows."""
    batch, _, n_heads, _ = q.shape
    group = n_heads // k.shape[2]
    statistics = q.new_empty(0, dtype=accumulation_dtype(q.dtype))
    for run in runs(q, k, memory, window, first_step, first_slot):
        n_blocks = max(1, CHUNK_SCORES // (n_heads * run.visible.numel()))
        n_rows = max(1, n_blocks // run.n_blocks)
        complete_bias = None
        for first in range(0, run.n_blocks, n_blocks):
            part = run.of(range(first, min(first + n_blocks, run.n_blocks)))
            bias = complete_bias
            if bias is None or not part.complete:
                bias = part.bias(statistics).repeat(1, group, 1)[:, None]
            if part.complete:
                complete_bias = bias
            for row in range(0, batch, n_rows):
                rows = slice(row, min(row + n_rows, batch))
                of_rows = bias if len(bias) == 1 else bias.repeat(rows.stop - rows.start, 1, 1, 1)
                yield Chunk(part, rows, group, of_rows)


def _as_rows(lse: Tensor) -> Tensor:
    """lse (B, H, T) as (B, T, H, 1)."""
    return lse.transpose(1, 2)[..., None]
