"""Stream attention over blocks of consecutive queries in plain PyTorch, with its own backward; runs on any device.

The queries are cut into blocks. Block i owns three strips of consecutive rows: its queries, the tokens that any of them sees,
and the slots that any of them sees. From one block to the next a strip advances by a fixed number of rows, so the strips of many blocks
are one overlapping view of the tensor, and a chunk of blocks is a handful of batched matrix products with [slots | tokens] as keys:

    S = scale * Q K^T + bias;  P = softmax(S);  O = P V                         bias is 0 where a query sees a key, else -inf
    P = exp(S - lse);  dS = scale * P * (dO V^T - rowsum(dO * O));  dQ = dS K;  dK = dS^T Q;  dV = P^T dO

Blocks begin just after a write and hold whole strides: every block then has the same bias, but for the rows that do not exist at
both ends of the sequence. Steps up to 0 see the slots before the first write, which do not advance, so they form a run of
blocks of their own; so do all steps when the memory is static. Rows that a strip lacks are zeros, and masked. A chunk is
small enough that its scores and gathered keys stay in cache; memory is linear in T.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from smt_kernels.window import WindowSpec

# Queries per block, rounded up to whole strides: larger blocks waste more products on masked keys, smaller ones run them slower.
BLOCK_QUERIES = 32
# Scores per chunk: 32 blocks of 32 queries by 97 keys (400 kB in fp32), the fastest of the sizes between 8 and 128 blocks.
CHUNK_SCORES = 100_000


@dataclass(frozen=True)
class Strip:
    """Rows [start + advance * i, start + advance * i + length) of a sequence, for block i; only rows low..high - 1 exist."""

    start: int
    length: int
    advance: int
    low: int
    high: int

    def covered(self, blocks: range) -> tuple[int, int]:
        """The rows [start, stop) of these blocks together, existing or not."""
        start = self.start + self.advance * blocks.start
        return start, start + self.advance * (len(blocks) - 1) + self.length

    def existing(self, blocks: range) -> tuple[int, int]:
        """The rows [start, stop) of these blocks that exist."""
        start, stop = self.covered(blocks)
        start = min(max(start, self.low), self.high)
        return start, max(min(stop, self.high), start)

    def complete(self, blocks: range) -> bool:
        """Whether all rows of these blocks exist."""
        return self.existing(blocks) == self.covered(blocks)

    def exists(self, blocks: range, device: torch.device) -> Tensor:
        """Which rows exist, as bool (blocks, length)."""
        first = self.start + self.advance * torch.arange(blocks.start, blocks.stop, device=device)
        row = first[:, None] + torch.arange(self.length, device=device)
        return (row >= self.low) & (row < self.high)

    def gather(self, x: Tensor, blocks: range, fill: float = 0.0) -> Tensor:
        """The strips of x (B, rows, H, D) as a view or padded copy (B, H, blocks, length, D); missing rows hold ``fill``."""
        (start, stop), (first, last) = self.covered(blocks), self.existing(blocks)
        x = x[:, first:last]
        if not self.complete(blocks):
            before = min(max(first - start, 0), stop - start)
            x = pad(x, (0, 0, 0, 0, before, stop - start - before - (last - first)), value=fill)
        if len(blocks) == 1 or self.advance == 0:
            return x.transpose(1, 2)[:, :, None].expand(-1, -1, len(blocks), -1, -1)
        return x.unfold(1, self.length, self.advance).permute(0, 2, 1, 4, 3)

    def add(self, x: Tensor, blocks: range, values: Tensor) -> None:
        """The transpose of ``gather``: add values (B, H, blocks, length, D) to the rows of x (B, rows, H, D), in a fixed order."""
        if len(blocks) == 1 or self.advance == 0:
            total = values.sum(2)
        else:
            # Segment by segment of one advance: the rows of all blocks' segments do not overlap.
            n_segments = -(-self.length // self.advance)
            total = values.new_zeros(*values.shape[:2], len(blocks) + n_segments - 1, self.advance, values.shape[-1])
            for segment in range(n_segments):
                part = values[..., segment * self.advance : (segment + 1) * self.advance, :]
                total[:, :, segment : segment + len(blocks), : part.shape[3]].add_(part)
            total = total.flatten(2, 3)
        (start, _), (first, last) = self.covered(blocks), self.existing(blocks)
        x[:, first:last].add_(total[:, :, first - start : last - start].transpose(1, 2))


@dataclass(frozen=True)
class Run:
    """Blocks of one geometry: the strips that each owns, and which of its keys [slots | tokens] a query sees if they exist."""

    n_blocks: int
    queries: Strip
    slots: Strip | None
    tokens: Strip
    visible: Tensor  # (queries, keys)

    @property
    def key_strips(self) -> list[Strip]:
        """Slots, if there are any, and tokens."""
        return [strip for strip in (self.slots, self.tokens) if strip is not None]

    def complete(self, blocks: range) -> bool:
        """Whether all keys of these blocks exist."""
        return all(strip.complete(blocks) for strip in self.key_strips)

    def bias(self, blocks: range, group: int, dtype: torch.dtype) -> Tensor:
        """What to add to the scores: 0 or -inf, (1 or blocks, group * queries, keys), 1 if no row of these blocks is missing."""
        visible = self.visible[None]
        if not self.complete(blocks):
            visible = visible & torch.cat([strip.exists(blocks, visible.device) for strip in self.key_strips], dim=1)[:, None]
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return bias.masked_fill_(~visible, float("-inf")).repeat(1, group, 1)


@dataclass(frozen=True)
class Chunk:
    """Some blocks of a run for some batch rows and key/value heads: what is computed at once."""

    run: Run
    blocks: range
    batch: slice
    heads: slice
    group: int  # query heads per key/value head
    bias: Tensor  # (1 or blocks, group * queries, keys)

    def query_rows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """The queries' rows of x (B, T, H, D): (batch * heads * blocks, group * queries, D) in the accumulation dtype."""
        x = self.run.queries.gather(x[self.batch, :, self._query_heads], self.blocks, fill)
        x = x.unflatten(1, (-1, self.group)).transpose(2, 3)
        return torch.empty(x.shape, dtype=_statistics(x.dtype), device=x.device).copy_(x).flatten(3, 4).flatten(0, 2)

    def keys(self, tokens: Tensor, memory: Tensor | None) -> Tensor:
        """The rows [slots | tokens] of memory and tokens: (batch * heads * blocks, keys, D) in the accumulation dtype."""
        tokens = self.run.tokens.gather(tokens[self.batch, :, self.heads], self.blocks)
        shape = (*tokens.shape[:3], self.run.visible.shape[1], tokens.shape[4])
        keys = torch.empty(shape, dtype=_statistics(tokens.dtype), device=tokens.device)
        keys[..., -tokens.shape[3] :, :].copy_(tokens)
        if self.run.slots is not None:
            slots = self.run.slots.gather(memory[self.batch, :, self.heads], self.blocks)
            keys[..., : slots.shape[3], :].copy_(slots)
        return keys.flatten(0, 2)

    def set_query_rows(self, x: Tensor, values: Tensor) -> None:
        """Write values (batch * heads * blocks, group * queries, D) to the queries' rows of x (B, T, H, D)."""
        strip = self.run.queries
        x = x[self.batch, :, self._query_heads]
        values = values.reshape(x.shape[0], -1, len(self.blocks), self.group, strip.length, x.shape[-1])
        values = values.transpose(2, 3).reshape(*x.transpose(1, 2).shape[:2], -1, x.shape[-1])
        (start, _), (first, last) = strip.covered(self.blocks), strip.existing(self.blocks)
        x[:, first:last] = values[:, :, first - start : last - start].transpose(1, 2)

    def add_keys(self, tokens: Tensor, memory: Tensor | None, values: Tensor) -> None:
        """The transpose of ``keys``: add values (batch * heads * blocks, keys, D) to the rows of memory and tokens."""
        tokens = tokens[self.batch, :, self.heads]
        values = values.unflatten(0, (tokens.shape[0], tokens.shape[2], len(self.blocks)))
        self.run.tokens.add(tokens, self.blocks, values[..., -self.run.tokens.length :, :])
        if self.run.slots is not None:
            self.run.slots.add(memory[self.batch, :, self.heads], self.blocks, values[..., : self.run.slots.length, :])

    @property
    def _query_heads(self) -> slice:
        return slice(self.heads.start * self.group, self.heads.stop * self.group)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    window: WindowSpec,
    scale: float,
    first_step: int,
    first_slot: int,
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k, v (B, S, H_kv, D), memory (B, K, H_kv, D) -> out (B, T, H, D), lse (B, H, T) in fp32 (fp64 for fp64)."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_statistics(q.dtype))
    for chunk in _chunks(q, k, memory_k, window, first_step, first_slot):
        queries = chunk.query_rows(q)
        bias = chunk.bias if len(chunk.bias) == 1 else chunk.bias.repeat(len(queries) // len(chunk.blocks), 1, 1)
        scores = torch.baddbmm(bias, queries, chunk.keys(k, memory_k).mT, alpha=scale)
        weights = torch.softmax(scores, dim=-1)
        # max(weights) = exp(max(scores) - lse), and it is at least 1 / keys: two maxima cost less than a logsumexp.
        chunk.set_query_rows(_as_rows(lse), scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log_())
        chunk.set_query_rows(out, weights @ chunk.keys(v, memory_v))
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: WindowSpec,
    scale: float,
    first_step: int,
    first_slot: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, memory_k and memory_v, each in the shape and dtype of its input."""
    dq = q.new_empty(q.shape)
    inputs = (k, v, memory_k, memory_v)
    dk, dv, dmemory_k, dmemory_v = (
        None if x is None else torch.zeros(x.shape, dtype=_statistics(x.dtype), device=x.device) for x in inputs
    )
    for chunk in _chunks(q, k, memory_k, window, first_step, first_slot):
        queries, grad = chunk.query_rows(q), chunk.query_rows(grad_out)
        keys, values = chunk.keys(k, memory_k), chunk.keys(v, memory_v)
        # A missing query row has lse = inf, so its weights are 0 and it adds nothing to any gradient.
        weights = chunk.bias - chunk.query_rows(_as_rows(lse), fill=float("inf")).unflatten(0, (-1, len(chunk.blocks)))
        weights = weights.flatten(0, 1).baddbmm_(queries, keys.mT, alpha=scale).exp_()
        delta = (chunk.query_rows(out) * grad).sum(-1, keepdim=True).mul_(-scale)
        grad_scores = torch.baddbmm(delta, grad, values.mT, alpha=scale).mul_(weights)
        chunk.set_query_rows(dq, grad_scores @ keys)
        chunk.add_keys(dk, dmemory_k, grad_scores.mT @ queries)
        chunk.add_keys(dv, dmemory_v, weights.mT @ grad)
    return (dq, *(None if g is None else g.to(q.dtype) for g in (dk, dv, dmemory_k, dmemory_v)))


def _chunks(
    q: Tensor, k: Tensor, memory: Tensor | None, window: WindowSpec, first_step: int, first_slot: int
) -> Iterator[Chunk]:
    """Cut the work into chunks of about ``CHUNK_SCORES`` scores: few blocks of one head, or all blocks of many heads."""
    n_batch, n_heads = k.shape[0], k.shape[2]
    group = q.shape[2] // n_heads
    for run in _runs(q, k, memory, window, first_step, first_slot):
        n_matrices = max(1, CHUNK_SCORES // (group * run.visible.numel()))
        blocks = min(run.n_blocks, n_matrices)
        heads = min(n_heads, max(1, n_matrices // run.n_blocks))
        batch = max(1, n_matrices // (run.n_blocks * n_heads))
        complete_bias = None
        for i in range(0, run.n_blocks, blocks):
            chunk_blocks = range(i, min(i + blocks, run.n_blocks))
            bias = complete_bias if complete_bias is not None and run.complete(chunk_blocks) else run.bias(chunk_blocks, group, _statistics(q.dtype))
            if run.complete(chunk_blocks):
                complete_bias = bias
            for b, h in itertools.product(range(0, n_batch, batch), range(0, n_heads, heads)):
                yield Chunk(run, chunk_blocks, slice(b, min(b + batch, n_batch)), slice(h, min(h + heads, n_heads)), group, bias)


def _runs(q: Tensor, k: Tensor, memory: Tensor | None, window: WindowSpec, first_step: int, first_slot: int) -> Iterator[Run]:
    """Cut the queries into runs; each query is in exactly one."""
    stop_step = first_step + k.shape[1]
    first_query_step = stop_step - q.shape[1]
    n_slots = 0 if memory is None else memory.shape[1]
    if window.stride is not None and window.n_memory == 0:
        n_slots = 0
    stride = window.stride if n_slots else None
    for first, stop, advancing in _pieces(first_query_step, stop_step, window, stride):
        if advancing:
            begin = window.block_end(window.block_of(first) - 1) + 1
            length = -(-BLOCK_QUERIES // stride) * stride
        else:
            begin = first
            length = min(BLOCK_QUERIES, stop - first)
        query_step = torch.arange(begin, begin + length, device=q.device)
        oldest, _ = window.visible_tokens(begin)
        token_step = torch.arange(oldest, begin + length, device=q.device)
        visible = [window.token_visible(query_step, token_step)]
        slots = None
        if n_slots:
            slot, end = first_slot, first_slot + n_slots
            if stride is not None:
                slot, end = window.visible_slots(begin)[0], window.visible_slots(begin + length - 1)[1]
            slots = Strip(slot - first_slot, end - slot, length // stride if advancing else 0, 0, n_slots)
            visible.insert(0, window.slot_visible(query_step, torch.arange(slot, end, device=q.device)))
        yield Run(
            n_blocks=-(-(stop - begin) // length),
            queries=Strip(begin - first_query_step, length, length, first - first_query_step, stop - first_query_step),
            slots=slots,
            tokens=Strip(oldest - first_step, len(token_step), length, 0, k.shape[1]),
            visible=torch.cat(visible, dim=1),
        )


def _pieces(start: int, stop: int, window: WindowSpec, stride: int | None) -> Iterator[tuple[int, int, bool]]:
    """The steps (first, stop) of each run, and whether the slots advance within it."""
    if stride is None or stop - start <= BLOCK_QUERIES:
        yield start, stop, False
        return
    if start <= 0:
        yield start, min(stop, 1), False
        start = 1
    if stride <= BLOCK_QUERIES:
        if start < stop:
            yield start, stop, True
        return
    while start < stop:  # A stride longer than a block is a run by itself, in which the slots stay.
        end = min(stop, window.block_end(window.block_of(start)) + 1)
        yield start, end, False
        start = end


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as_rows(lse: Tensor) -> Tensor:
    """lse (B, H, T) as (B, T, H, 1)."""
    return lse.transpose(1, 2)[..., None]
