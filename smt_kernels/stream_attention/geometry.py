"""The visibility of ``WindowSpec`` inside the kernels of stream attention, in numbers that fit 32 bits.

Kernels count entries from the first one given: query i of q, token j of k, slot j of memory_k. Of the slots, query i sees those
of [written - n_memory, written) that are given, where ``written`` counts from the first one given too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.window import WindowSpec

# Scalars that change from call to call: specialising on their values would compile again for no gain.
SIZES = ["n_queries", "n_keys", "n_slots", "first_query", "first_slot", "n_memory", "n_tokens", "n_kv_heads"]
_FAR = 2**30  # beyond every entry, and its double still fits 32 bits


def arguments(q: Tensor, k: Tensor, memory: Tensor, window: WindowSpec, first_step: int, first_slot: int) -> dict[str, int]:
    """What kernels are told about who sees whom, by the names of their parameters; ``STRIDE`` is 0 for static memory."""
    n_queries, n_keys, n_slots = q.shape[1], k.shape[1], memory.shape[1]
    if window.stride is not None:
        # Leaving out the writes before the first step changes no difference between counts; nothing is written before step 1.
        passed = window.writes_before(first_step)
        first_step, first_slot = max(first_step - passed * window.stride, -n_keys), first_slot - passed
        if window.n_memory == 0:
            n_slots = 0
    return {
        "n_queries": n_queries,
        "n_keys": n_keys,
        "n_slots": n_slots,
        "first_query": first_step + n_keys - n_queries if window.stride is not None else 0,
        "first_slot": min(max(first_slot, -_FAR), _FAR),
        "n_memory": min(window.n_memory, _FAR),
        "n_tokens": min(window.n_tokens, _FAR),
        "n_kv_heads": k.shape[2],
        "GROUP": q.shape[2] // k.shape[2],
        "STRIDE": window.stride or 0,
    }


@triton.jit
def written(i_query, first_query, first_slot, STRIDE: tl.constexpr):
    """How many slots were written before a query, not counting those before the first one given; ``writes_before``."""
    return tl.maximum(first_query + i_query - 1, 0) // STRIDE - first_slot


@triton.jit
def slots_seen(i_first, i_last, n_slots, first_query, first_slot, n_memory, STRIDE: tl.constexpr):
    """Slots [start, stop) that any of the queries i_first..i_last sees; ``visible_slots``."""
    start, stop = 0, n_slots
    if STRIDE > 0:
        start = tl.maximum(written(i_first, first_query, first_slot, STRIDE) - n_memory, 0)
        stop = tl.minimum(written(i_last, first_query, first_slot, STRIDE), n_slots)
    return start, stop


@triton.jit
def tokens_seen(i_first, i_last, n_queries, n_keys, n_tokens):
    """Tokens [start, stop) that any of the queries i_first..i_last sees; ``visible_tokens``."""
    history = n_keys - n_queries
    return tl.maximum(i_first + history - n_tokens + 1, 0), i_last + history + 1


@triton.jit
def slot_visible(o_query, o_slot, stop, first_query, first_slot, n_memory, STRIDE: tl.constexpr):
    """Which slots before ``stop`` a query sees."""
    visible = o_slot < stop
    if STRIDE > 0:
        b_written = written(o_query, first_query, first_slot, STRIDE)
        visible = visible & (o_slot < b_written) & (o_slot >= b_written - n_memory)
    return visible


@triton.jit
def token_visible(o_query, o_token, stop, n_queries, n_keys, n_tokens):
    """Which tokens before ``stop`` a query sees."""
    o_own = o_query + (n_keys - n_queries)
    return (o_token < stop) & (o_token <= o_own) & (o_token > o_own - n_tokens)


@triton.jit
def queries_seeing(i_first, i_last, n_queries, first_query, first_slot, n_memory, STRIDE: tl.constexpr):
    """Queries [start, stop) that see any of the slots i_first..i_last."""
    start, stop = 0, n_queries
    if STRIDE > 0:
        # Slot w is seen from the step after its write up to the step whose write pushes it out; slots may lie far away.
        first = (i_first + first_slot).to(tl.int64)
        last = (i_last + first_slot).to(tl.int64) + n_memory
        from_step = tl.where(first < 0, first_query, (first + 1) * STRIDE + 1)
        to_step = tl.where(last < 0, first_query - 1, (last + 1) * STRIDE)
        start = tl.minimum(tl.maximum(from_step - first_query, 0), n_queries).to(tl.int32)
        stop = tl.minimum(tl.maximum(to_step + 1 - first_query, 0), n_queries).to(tl.int32)
    return start, stop
