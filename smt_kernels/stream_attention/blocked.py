"""Stream attention over blocks of consecutive queries in plain PyTorch, with its own backward; runs on any device.

The queries are cut into blocks. A block owns three strips of consecutive rows: its queries, the slots that any of them sees and
the tokens that any of them sees. From one block to the next a strip advances by a fixed number of rows, so the strips of many
blocks are one overlapping view, and a chunk of blocks is a handful of batched matrix products with [slots | tokens] as keys:

    S = scale Q K^T + bias;  P = softmax(S);  O = P V                           bias is 0 where a query sees a key, else -inf
    P = exp(S - lse);  dS = scale P * (dO V^T - rowsum(dO * O));  dQ = dS K;  dK = dS^T Q;  dV = P^T dO

Blocks hold whole strides, so that all have the same bias, but for rows that do not exist at the ends of the sequence: those are
gathered as zeros and masked. A chunk is small enough that its keys and scores stay in cache; memory is linear in T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from smt_kernels.window import WindowSpec

# Queries per block, rounded up to whole strides: larger blocks spend more on masked keys, smaller ones run slower per key.
BLOCK_QUERIES = 32
# Scores per chunk, 1 MB in fp32: half or twice as many are as fast; with fewer the time goes to Python, with more to memory.
CHUNK_SCORES = 2**18


@dataclass(frozen=True)
class Strip:
    """Rows [start + advance * i, start + advance * i + length) of a tensor, for block i. Only the rows 0..size - 1 exist."""

    start: int
    length: int
    advance: int
    size: int

    def covered(self, blocks: range) -> tuple[int, int]:
        """The rows [start, stop) of these blocks together, existing or not."""
        start = self.start + self.advance * blocks.start
        return start, start + self.advance * (len(blocks) - 1) + self.length

    def existing(self, blocks: range) -> tuple[int, int]:
        """The rows [start, stop) of these blocks that exist."""
        return _clip(self.covered(blocks), 0, self.size)

    def complete(self, blocks: range) -> bool:
        """Whether all rows of these blocks exist."""
        return self.existing(blocks) == self.covered(blocks)

    def exists(self, blocks: range, device: torch.device) -> Tensor:
        """Which rows exist, as bool (blocks, length)."""
        first = self.start + self.advance * torch.arange(blocks.start, blocks.stop, device=device)
        row = first[:, None] + torch.arange(self.length, device=device)
        return (row >= 0) & (row < self.size)

    def gather(self, x: Tensor, blocks: range) -> Tensor:
        """The strips of x (B, rows, H, D), (B, H, blocks, length, D): a view where all rows exist, else a padded copy."""
        (start, stop), (first, last) = self.covered(blocks), self.existing(blocks)
        x = x[:, first:last]
        if not self.complete(blocks):
            before = min(max(first - start, 0), stop - start)
            x = pad(x, (0, 0, 0, 0, before, stop - start - before - (last - first)))
        if self.advance == 0:
            return x.transpose(1, 2)[:, :, None].expand(-1, -1, len(blocks), -1, -1)
        return x.unfold(1, self.length, self.advance).permute(0, 2, 1, 4, 3)

    def add(self, x: Tensor, blocks: range, values: Tensor) -> None:
        """The transpose of ``gather``: add values (B, H, blocks, length, D) to x (B, rows, H, D), in a fixed order."""
        if self.advance == 0:
            total = values.sum(2)
        else:
            # One advance of rows at a time: those of all blocks lie side by side.
            n_parts = -(-self.length // self.advance)
            total = values.new_zeros(*values.shape[:2], len(blocks) + n_parts - 1, self.advance, values.shape[-1])
            for i, part in enumerate(values.split(self.advance, dim=3)):
                total[:, :, i : i + len(blocks), : part.shape[3]].add_(part)
            total = total.flatten(2, 3)
        (start, _), (first, last) = self.covered(blocks), self.existing(blocks)
        x[:, first:last].add_(total[:, :, first - start : last - start].transpose(1, 2))


@dataclass(frozen=True)
class Run:
    """Blocks of one geometry: the strips of each, and which of its keys [slots | tokens] a query sees where they exist."""

    n_blocks: int
    queries: Strip
    slots: Strip
    tokens: Strip
    visible: Tensor  # (queries, keys)

    def complete(self, blocks: range) -> bool:
        """Whether all keys of these blocks exist."""
        return self.slots.complete(blocks) and self.tokens.complete(blocks)

    def bias(self, blocks: range, like: Tensor) -> Tensor:
        """What to add to the scores of these blocks, 0 or -inf: (1 if complete, else blocks, queries, keys)."""
        visible = self.visible[None]
        if not self.complete(blocks):
            exists = [strip.exists(blocks, visible.device) for strip in (self.slots, self.tokens)]
            visible = visible & torch.cat(exists, dim=1)[:, None]
        return like.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))


@dataclass(frozen=True)
class Chunk:
    """What is computed at once: some blocks of a run, for some batch rows and all heads."""

    run: Run
    blocks: range
    batch: slice
    group: int  # query heads per key/value head
    bias: Tensor  # (1 or blocks, group * queries, keys)

    def queries(self, x: Tensor) -> Tensor:
        """The query rows of x (B, T, H, D): (batch * kv heads * blocks, group * queries, D) in the accumulation dtype."""
        x = self.run.queries.gather(x[self.batch], self.blocks)
        x = x.unflatten(1, (-1, self.group)).transpose(2, 3)
        return torch.empty(x.shape, dtype=_accumulation(x.dtype), device=x.device).copy_(x).flatten(3, 4).flatten(0, 2)

    def set_queries(self, x: Tensor, values: Tensor) -> None:
        """The inverse of ``queries``: write the rows that exist to x (B, T, H, D)."""
        strip = self.run.queries
        x = x[self.batch]
        values = values.reshape(x.shape[0], -1, len(self.blocks), self.group, strip.length, x.shape[3])
        values = values.transpose(2, 3).reshape(x.shape[0], x.shape[2], -1, x.shape[3])
        (start, _), (first, last) = strip.covered(self.blocks), strip.existing(self.blocks)
        x[:, first:last] = values[:, :, first - start : last - start].transpose(1, 2)

    def keys(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """The rows [slots | tokens] of memory and tokens: (batch * heads * blocks, keys, D) in the accumulation dtype."""
        slots = self.run.slots.gather(memory[self.batch], self.blocks)
        tokens = self.run.tokens.gather(tokens[self.batch], self.blocks)
        shape = (*tokens.shape[:3], slots.shape[3] + tokens.shape[3], tokens.shape[4])
        keys = torch.empty(shape, dtype=_accumulation(tokens.dtype), device=tokens.device)
        keys[..., : slots.shape[3], :] = slots
        keys[..., slots.shape[3] :, :] = tokens
        return keys.flatten(0, 2)

    def add_keys(self, memory: Tensor, tokens: Tensor, values: Tensor) -> None:
        """The transpose of ``keys``: add values (batch * heads * blocks, keys, D) to the rows of memory and tokens."""
        memory, tokens = memory[self.batch], tokens[self.batch]
        values = values.unflatten(0, (tokens.shape[0], tokens.shape[2], len(self.blocks)))
        slots, values = values.split([self.run.slots.length, self.run.tokens.length], dim=3)
        self.run.slots.add(memory, self.blocks, slots)
        self.run.tokens.add(tokens, self.blocks, values)


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
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_accumulation(q.dtype))
    for chunk in _chunks(q, k, memory_k, window, first_step, first_slot):
        queries = chunk.queries(q)
        bias = chunk.bias if len(chunk.bias) == 1 else chunk.bias.repeat(len(queries) // len(chunk.bias), 1, 1)
        scores = torch.baddbmm(bias, queries, chunk.keys(memory_k, k).mT, alpha=scale)
        weights = torch.softmax(scores, dim=-1)
        # The largest weight is exp(max(scores) - lse) and at least 1 / keys: two maxima cost less than one logsumexp.
        chunk.set_queries(_as_rows(lse), scores.amax(-1) - weights.amax(-1).log_())
        chunk.set_queries(out, weights @ chunk.keys(memory_v, v))
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: WindowSpec,
    scale: float,
    first_step: int,
    first_slot: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, memory_k and memory_v, each in the shape and dtype of its input."""
    dq = q.new_empty(q.shape)
    dk, dv, dmemory_k, dmemory_v = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (k, v, memory_k, memory_v))
    for chunk in _chunks(q, k, memory_k, window, first_step, first_slot):
        queries, grad = chunk.queries(q), chunk.queries(grad_out)
        keys, values = chunk.keys(memory_k, k), chunk.keys(memory_v, v)
        # A query row that does not exist is zero in q, dO and lse: its weights are finite and it adds nothing to any gradient.
        statistics = chunk.queries(_as_rows(lse)).unflatten(0, (-1, len(chunk.blocks)))
        weights = (chunk.bias - statistics).flatten(0, 1).baddbmm_(queries, keys.mT, alpha=scale).exp_()
        delta = (grad * chunk.queries(out)).sum(-1, keepdim=True)
        grad_scores = torch.baddbmm(delta, grad, values.mT, beta=-scale, alpha=scale).mul_(weights)
        chunk.set_queries(dq, grad_scores @ keys)
        chunk.add_keys(dmemory_k, dk, grad_scores.mT @ queries)
        chunk.add_keys(dmemory_v, dv, weights.mT @ grad)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dmemory_k.to(k.dtype), dmemory_v.to(v.dtype)


def _chunks(q: Tensor, k: Tensor, memory: Tensor, window: WindowSpec, first_step: int, first_slot: int) -> Iterator[Chunk]:
    """Cut the work into chunks of about ``CHUNK_SCORES`` scores: some blocks of one batch row, or all blocks of many rows."""
    group = q.shape[2] // k.shape[2]
    statistics = q.new_empty(0, dtype=_accumulation(q.dtype))
    for run in _runs(q, k, memory, window, first_step, first_slot):
        n_blocks = max(1, CHUNK_SCORES // (q.shape[2] * run.visible.numel()))
        n_rows = max(1, n_blocks // run.n_blocks)
        complete_bias = None
        for i in range(0, run.n_blocks, n_blocks):
            blocks = range(i, min(i + n_blocks, run.n_blocks))
            bias = complete_bias
            if bias is None or not run.complete(blocks):
                bias = run.bias(blocks, statistics).repeat(1, group, 1)
            if run.complete(blocks):
                complete_bias = bias
            for row in range(0, q.shape[0], n_rows):
                yield Chunk(run, blocks, slice(row, row + n_rows), group, bias)


def _runs(q: Tensor, k: Tensor, memory: Tensor, window: WindowSpec, first_step: int, first_slot: int) -> Iterator[Run]:
    """The geometry of each run of blocks; every query is in exactly one."""
    end = first_step + k.shape[1]
    first_query = end - q.shape[1]
    n_slots = memory.shape[1]
    if window.stride is not None:
        # Slots that no query sees are left out like those that do not exist: a weight of 0 times what they hold may be nan.
        seen = window.visible_slots(end - 1)[1] - first_slot if window.n_memory else 0
        n_slots = min(max(seen, 0), n_slots)
    for first, stop, advancing in _pieces(first_query, end, window, n_slots > 0):
        length = -(-BLOCK_QUERIES // window.stride) * window.stride if advancing else min(BLOCK_QUERIES, stop - first)
        n_blocks = -(-(stop - first) // length)
        last = first + length - 1  # of the first block
        tokens = window.visible_tokens(first)[0], last + 1
        slots = first_slot, first_slot + n_slots
        if n_slots and window.stride is not None:
            slots = window.visible_slots(first)[0], window.visible_slots(last)[1]
        if n_blocks == 1:
            # A single block gathers only what exists, and a single query then needs no mask: the case of decoding.
            tokens = _clip(tokens, first_step, end)
            slots = _clip(slots, first_slot, first_slot + n_slots)
        if length == 1:
            visible = torch.ones(1, slots[1] - slots[0] + tokens[1] - tokens[0], dtype=torch.bool, device=q.device)
        else:
            query_step = torch.arange(first, last + 1, device=q.device)
            slot_visible = window.slot_visible(query_step, torch.arange(*slots, device=q.device))
            token_visible = window.token_visible(query_step, torch.arange(*tokens, device=q.device))
            visible = torch.cat([slot_visible, token_visible], dim=1)
        yield Run(
            n_blocks,
            queries=Strip(first - first_query, length, length, stop - first_query),
            slots=Strip(slots[0] - first_slot, slots[1] - slots[0], length // window.stride if advancing else 0, n_slots),
            tokens=Strip(tokens[0] - first_step, tokens[1] - tokens[0], length, k.shape[1]),
            visible=visible,
        )


def _pieces(start: int, stop: int, window: WindowSpec, has_slots: bool) -> Iterator[tuple[int, int, bool]]:
    """Cut steps [start, stop) so that in each piece the slots stay, or advance by one per stride, or there is one block."""
    if not has_slots or window.stride is None or stop - start <= BLOCK_QUERIES:
        yield start, stop, False
    elif start <= 0:  # Nothing is written before step 1.
        yield start, min(stop, 1), False
        if stop > 1:
            yield from _pieces(1, stop, window, has_slots)
    elif window.stride <= BLOCK_QUERIES:
        yield start, stop, True
    else:  # A stride longer than a block is a piece by itself.
        while start < stop:
            end = min(stop, window.block_end(window.block_of(start)) + 1)
            yield start, end, False
            start = end


def _clip(interval: tuple[int, int], low: int, high: int) -> tuple[int, int]:
    """The part of [start, stop) that lies in [low, high), empty if none does."""
    start = min(max(interval[0], low), high)
    return start, max(min(interval[1], high), start)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as_rows(lse: Tensor) -> Tensor:
    """lse (B, H, T) as (B, T, H, 1)."""
    return lse.transpose(1, 2)[..., None]
