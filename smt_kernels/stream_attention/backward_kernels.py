"""Stream attention in Triton, backward: one kernel for queries and tokens, one for slots.

    P = exp(scale Q K^T - lse);  delta = rowsum(dO * O);  dS = P * (dO V^T - delta)
    dQ = scale dS K;  dK = scale dS^T Q;  dV = P^T dO

A program of the first kernel owns the queries and the tokens of 64 steps. Its queries need their slots and the tokens up to
n_tokens - 1 steps earlier, for dQ; its tokens need the queries up to n_tokens - 1 steps later, for dK and dV; the products of
its own queries and tokens serve all three. A program of the second kernel owns 32 slots and goes through the queries that see
them, whose deltas the first kernel leaves behind. Nothing is written twice: no atomics, and the bits repeat.

Why queries and tokens together. In rows of the head per step (window 15 + 50, stride 16, one query head per key head), the
least is q, k, v, out, dO, dQ, dK, dV and 4/16 of a slot, 8.3. Apart, programs of 64 steps read and write 8.1 and 7.5 (the
second finds the deltas), and with the 3.2 of the slots' kernel 18.8, 2.3 times the least; together 12.4 and 3.2, 1.9 times.
Slots are seen for 240 steps: 32 of them read 2 (240 + 31 * 16) / 512 = 2.9 rows per step, 16 of them would read 3.8. Visible
are 65 keys per query, five products each; multiplied are 5 * 64 + 3 (64 + 32) + 4 * 64 and for slots 4 (736 / 16), 3.2 times
as many. Registers do not hold both on Ampere (``SEPARATE``), nor anywhere in a loop over heads that share keys:
there the first kernel runs once for queries and once for tokens.

Gradients are zero where nothing is seen, whatever the memory holds there: what no query sees is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smt_kernels import launch as launching
from smt_kernels.launch import ceil_div, head_settings, launch
from smt_kernels.stream_attention.geometry import (
    SIZES,
    arguments,
    queries_seeing,
    slot_visible,
    slots_seen,
    token_visible,
    tokens_seen,
)
from smt_kernels.stream_attention.settings import SEPARATE, TABLE
from smt_kernels.tiles import LOG2_E, base_two, dot, load, products, row_products, rows, store
from smt_kernels.window import WindowSpec


@triton.jit
def _gradients(
    b_x, p_x, b_dx, p_dx, m_x, b_y, p_y, b_dy, p_dy, m_y, b_lse, b_delta, visible, i_chunk, log2_scale,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """P and dS, 0 where a query does not see a key. (x, dx) are (k, v) and (y, dy) are (q, dO), or the other way round.

    The products are shaped as x by y. What stays the same in a loop should be x, of which each warp holds only its rows.
    """
    b_s = products(b_x, p_x, m_x, b_y, p_y, m_y, i_chunk, HEAD_DIM, CHUNK) * log2_scale  # [x, y]
    b_p = tl.exp2(tl.where(visible, b_s, float("-inf")) - b_lse)  # [x, y]
    b_dp = products(b_dx, p_dx, m_x, b_dy, p_dy, m_y, i_chunk, HEAD_DIM, CHUNK)  # [x, y]
    b_ds = b_p * (b_dp - b_delta)  # [x, y]
    return b_p.to(b_x.dtype), b_ds.to(b_x.dtype)


@triton.jit(do_not_specialize=SIZES)
def _steps_kernel(
    grad_out, q, k, v, memory_k, memory_v, out, lse, delta, dq, dk, dv,
    strides_grad_out, strides_q, strides_k, strides_v, strides_memory_k, strides_memory_v, strides_out, strides_dq, strides_dk,
    n_queries, n_keys, n_slots, first_query, first_slot, n_memory, n_tokens, n_kv_heads, scale,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
    T: tl.constexpr, B: tl.constexpr, N: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """If QUERIES, dq and delta, and if TOKENS, dk and dv of T steps; the last n_queries tokens are those of queries."""
    n_blocks = tl.cdiv(n_keys, T)
    i_token = tl.program_id(0) % n_blocks * T
    i_batch = (tl.program_id(0) // n_blocks // n_kv_heads).to(tl.int64)
    i_kv_head = tl.program_id(0) // n_blocks % n_kv_heads
    i_chunk = tl.program_id(1)
    log2_scale = scale * LOG2_E
    history = n_keys - n_queries

    o_own = i_token + tl.arange(0, T)
    # History that no query sees is not read: its gradients are zeros, whatever it holds.
    m_own = (o_own < n_keys) & (o_own > history - n_tokens)
    p_own_k = rows(k, strides_k, i_batch, i_kv_head, o_own)
    p_own_v = rows(v, strides_v, i_batch, i_kv_head, o_own)
    b_dk = tl.zeros([T, CHUNK], dtype=tl.float32)
    b_dv = tl.zeros([T, CHUNK], dtype=tl.float32)

    o_query = o_own - history
    m_query = (o_query >= 0) & (o_query < n_queries)
    i_first = tl.maximum(i_token - history, 0)
    i_last = tl.minimum(i_token - history + T, n_queries) - 1
    slot_start, slot_stop = slots_seen(i_first, i_last, n_slots, first_query, first_slot, n_memory, STRIDE)
    token_start, token_stop = tokens_seen(i_first, i_last, n_queries, n_keys, n_tokens)
    # The products of own queries and tokens are formed once if both are asked for, and else with the others.
    together: tl.constexpr = QUERIES and TOKENS
    earlier_stop = i_token if together else token_stop
    later_start = tl.maximum(i_token - history + (T if together else 0), 0)
    # The last own token is seen for n_tokens - 1 steps more.
    later_stop = tl.minimum(i_token + T - 1 - history + n_tokens, n_queries)

    if TOKENS:
        b_own_k = load(p_own_k, m_own, i_chunk, HEAD_DIM, CHUNK)  # [T, CHUNK]
        b_own_v = load(p_own_v, m_own, i_chunk, HEAD_DIM, CHUNK)  # [T, CHUNK]

    for i_group in range(GROUP):
        i_head = i_kv_head * GROUP + i_group
        i_statistic = (i_batch * n_kv_heads * GROUP + i_head) * n_queries

        if QUERIES:
            p_q = rows(q, strides_q, i_batch, i_head, o_query)
            p_do = rows(grad_out, strides_grad_out, i_batch, i_head, o_query)
            b_q = load(p_q, m_query, i_chunk, HEAD_DIM, CHUNK)  # [T, CHUNK]
            b_do = load(p_do, m_query, i_chunk, HEAD_DIM, CHUNK)  # [T, CHUNK]
            p_out = rows(out, strides_out, i_batch, i_head, o_query)
            b_out = load(p_out, m_query, i_chunk, HEAD_DIM, CHUNK)  # [T, CHUNK]
            b_delta = row_products(b_do, p_do, b_out, p_out, m_query, i_chunk, HEAD_DIM, CHUNK)  # [T]
            if i_chunk == 0:
                tl.store(delta + i_statistic + o_query, b_delta, mask=m_query)
            b_lse = base_two(tl.load(lse + i_statistic + o_query, mask=m_query, other=0.0))  # [T]
            b_dq = tl.zeros([T, CHUNK], dtype=tl.float32)

            for i_slot in range(slot_start, slot_stop, N):
                o_k = i_slot + tl.arange(0, N)
                m_k = o_k < slot_stop
                p_k = rows(memory_k, strides_memory_k, i_batch, i_kv_head, o_k)
                p_v = rows(memory_v, strides_memory_v, i_batch, i_kv_head, o_k)
                b_k = load(p_k, m_k, i_chunk, HEAD_DIM, CHUNK)  # [N, CHUNK]
                b_v = load(p_v, m_k, i_chunk, HEAD_DIM, CHUNK)  # [N, CHUNK]
                visible = slot_visible(o_query[:, None], o_k[None, :], slot_stop, first_query, first_slot, n_memory, STRIDE)
                b_p, b_ds = _gradients(
                    b_q, p_q, b_do, p_do, m_query, b_k, p_k, b_v, p_v, m_k, b_lse[:, None], b_delta[:, None], visible,
                    i_chunk, log2_scale, HEAD_DIM, CHUNK,
                )  # fmt: skip
                b_dq += dot(b_ds, b_k)

            for i_earlier in range(token_start, earlier_stop, B):
                o_k = i_earlier + tl.arange(0, B)
                m_k = o_k < earlier_stop
                p_k = rows(k, strides_k, i_batch, i_kv_head, o_k)
                p_v = rows(v, strides_v, i_batch, i_kv_head, o_k)
                b_k = load(p_k, m_k, i_chunk, HEAD_DIM, CHUNK)  # [B, CHUNK]
                b_v = load(p_v, m_k, i_chunk, HEAD_DIM, CHUNK)  # [B, CHUNK]
                visible = token_visible(o_query[:, None], o_k[None, :], earlier_stop, n_queries, n_keys, n_tokens)
                b_p, b_ds = _gradients(
                    b_q, p_q, b_do, p_do, m_query, b_k, p_k, b_v, p_v, m_k, b_lse[:, None], b_delta[:, None], visible,
                    i_chunk, log2_scale, HEAD_DIM, CHUNK,
                )  # fmt: skip
                b_dq += dot(b_ds, b_k)

            if TOKENS:
                own_visible = token_visible(o_query[None, :], o_own[:, None], n_keys, n_queries, n_keys, n_tokens)
                b_own_p, b_own_ds = _gradients(
                    b_own_k, p_own_k, b_own_v, p_own_v, m_own, b_q, p_q, b_do, p_do, m_query, b_lse[None, :], b_delta[None, :],
                    own_visible, i_chunk, log2_scale, HEAD_DIM, CHUNK,
                )  # fmt: skip
                b_dq += dot(tl.trans(b_own_ds), b_own_k)
                b_dv += dot(b_own_p, b_do)
                b_dk += dot(b_own_ds, b_q)
            store(rows(dq, strides_dq, i_batch, i_head, o_query), m_query, i_chunk, b_dq * scale, HEAD_DIM, CHUNK)

        if TOKENS:
            for i_later in range(later_start, later_stop, B):
                o_later = i_later + tl.arange(0, B)
                m_later = o_later < later_stop
                p_later_q = rows(q, strides_q, i_batch, i_head, o_later)
                p_later_do = rows(grad_out, strides_grad_out, i_batch, i_head, o_later)
                b_later_q = load(p_later_q, m_later, i_chunk, HEAD_DIM, CHUNK)  # [B, CHUNK]
                b_later_do = load(p_later_do, m_later, i_chunk, HEAD_DIM, CHUNK)  # [B, CHUNK]
                if QUERIES:  # other programs have yet to find these deltas
                    p_later_out = rows(out, strides_out, i_batch, i_head, o_later)
                    b_later_out = load(p_later_out, m_later, i_chunk, HEAD_DIM, CHUNK)  # [B, CHUNK]
                    b_later_delta = row_products(
                        b_later_do, p_later_do, b_later_out, p_later_out, m_later, i_chunk, HEAD_DIM, CHUNK
                    )  # [B]
                else:
                    b_later_delta = tl.load(delta + i_statistic + o_later, mask=m_later, other=0.0)  # [B]
                b_later_lse = base_two(tl.load(lse + i_statistic + o_later, mask=m_later, other=0.0))  # [B]
                visible = token_visible(o_later[None, :], o_own[:, None], n_keys, n_queries, n_keys, n_tokens)
                b_p, b_ds = _gradients(
                    b_own_k, p_own_k, b_own_v, p_own_v, m_own, b_later_q, p_later_q, b_later_do, p_later_do, m_later,
                    b_later_lse[None, :], b_later_delta[None, :], visible, i_chunk, log2_scale, HEAD_DIM, CHUNK,
                )  # fmt: skip
                b_dv += dot(b_p, b_later_do)
                b_dk += dot(b_ds, b_later_q)

    if TOKENS:
        store(rows(dk, strides_dk, i_batch, i_kv_head, o_own), o_own < n_keys, i_chunk, b_dk * scale, HEAD_DIM, CHUNK)
        store(rows(dv, strides_dk, i_batch, i_kv_head, o_own), o_own < n_keys, i_chunk, b_dv, HEAD_DIM, CHUNK)


@triton.jit(do_not_specialize=SIZES)
def _slots_kernel(
    grad_out, q, memory_k, memory_v, lse, delta, dmemory_k, dmemory_v,
    strides_grad_out, strides_q, strides_memory_k, strides_memory_v, strides_dmemory,
    n_queries, n_keys, n_slots, first_query, first_slot, n_memory, n_tokens, n_kv_heads, scale,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dmemory_k and dmemory_v of N slots, over blocks of R rows; a row is a query and one head of its group."""
    n_blocks = tl.cdiv(n_slots, N)
    i_slot = tl.program_id(0) % n_blocks * N
    i_batch = (tl.program_id(0) // n_blocks // n_kv_heads).to(tl.int64)
    i_kv_head = tl.program_id(0) // n_blocks % n_kv_heads
    i_chunk = tl.program_id(1)
    log2_scale = scale * LOG2_E

    o_k = i_slot + tl.arange(0, N)
    # Slots that no query sees are not read: their gradients are zeros, whatever they hold.
    start, stop = slots_seen(0, n_queries - 1, n_slots, first_query, first_slot, n_memory, STRIDE)
    m_k = (o_k >= start) & (o_k < stop)
    p_k = rows(memory_k, strides_memory_k, i_batch, i_kv_head, o_k)
    p_v = rows(memory_v, strides_memory_v, i_batch, i_kv_head, o_k)
    b_k = load(p_k, m_k, i_chunk, HEAD_DIM, CHUNK)  # [N, CHUNK]
    b_v = load(p_v, m_k, i_chunk, HEAD_DIM, CHUNK)  # [N, CHUNK]
    b_dk = tl.zeros([N, CHUNK], dtype=tl.float32)
    b_dv = tl.zeros([N, CHUNK], dtype=tl.float32)

    i_last = tl.minimum(i_slot + N, n_slots) - 1
    start, stop = queries_seeing(i_slot, i_last, n_queries, first_query, first_slot, n_memory, STRIDE)
    for i_row in range(start * GROUP, stop * GROUP, R):
        o_row = i_row + tl.arange(0, R)
        o_query = o_row // GROUP
        m_q = o_query < stop
        o_head = i_kv_head * GROUP + o_row % GROUP
        p_q = rows(q, strides_q, i_batch, o_head, o_query)
        p_do = rows(grad_out, strides_grad_out, i_batch, o_head, o_query)
        b_q = load(p_q, m_q, i_chunk, HEAD_DIM, CHUNK)  # [R, CHUNK]
        b_do = load(p_do, m_q, i_chunk, HEAD_DIM, CHUNK)  # [R, CHUNK]
        o_statistic = (i_batch * n_kv_heads * GROUP + o_head) * n_queries + o_query
        b_lse = base_two(tl.load(lse + o_statistic, mask=m_q, other=0.0))  # [R]
        b_delta = tl.load(delta + o_statistic, mask=m_q, other=0.0)  # [R]
        visible = slot_visible(o_query[None, :], o_k[:, None], n_slots, first_query, first_slot, n_memory, STRIDE)
        b_p, b_ds = _gradients(
            b_k, p_k, b_v, p_v, m_k, b_q, p_q, b_do, p_do, m_q, b_lse[None, :], b_delta[None, :], visible,
            i_chunk, log2_scale, HEAD_DIM, CHUNK,
        )  # fmt: skip
        b_dv += dot(b_p, b_do)
        b_dk += dot(b_ds, b_q)

    m_store = o_k < n_slots
    store(rows(dmemory_k, strides_dmemory, i_batch, i_kv_head, o_k), m_store, i_chunk, b_dk * scale, HEAD_DIM, CHUNK)
    store(rows(dmemory_v, strides_dmemory, i_batch, i_kv_head, o_k), m_store, i_chunk, b_dv, HEAD_DIM, CHUNK)


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
    dq, dk, dv, dmemory_k, dmemory_v = (x.new_empty(x.shape) for x in (q, k, v, memory_k, memory_v))
    delta = torch.empty_like(lse)
    n_batch, n_keys, n_kv_heads, head_dim = k.shape
    sizes = arguments(q, k, memory_k, window, first_step, first_slot) | {"scale": scale, "HEAD_DIM": head_dim}

    settings = head_settings(TABLE, "stream_attention_steps", head_dim, q.dtype, q.device)
    family = launching.architecture_family(q.device)
    together = sizes["GROUP"] == 1 and (family, q.dtype.itemsize) not in SEPARATE
    for queries, tokens in ((True, True),) if together else ((True, False), (False, True)):
        launch(
            _steps_kernel,
            (ceil_div(n_keys, settings.query_block) * n_batch * n_kv_heads, ceil_div(head_dim, settings.head_chunk)),
            q.device,
            *(grad_out, q, k, v, memory_k, memory_v, out, lse, delta, dq, dk, dv),
            *(x.stride()[:3] for x in (grad_out, q, k, v, memory_k, memory_v, out, dq, dk)),
            **sizes,
            CHUNK=settings.head_chunk,
            T=settings.query_block,
            B=settings.key_block,
            N=settings.slot_block,
            QUERIES=queries,
            TOKENS=tokens,
            **settings.options,
        )
    if sizes["n_slots"] == 0:
        return dq, dk, dv, dmemory_k.zero_(), dmemory_v.zero_()
    settings = head_settings(TABLE, "stream_attention_slots", head_dim, q.dtype, q.device)
    launch(
        _slots_kernel,
        (ceil_div(sizes["n_slots"], settings.slot_block) * n_batch * n_kv_heads, ceil_div(head_dim, settings.head_chunk)),
        q.device,
        *(grad_out, q, memory_k, memory_v, lse, delta, dmemory_k, dmemory_v),
        *(x.stride()[:3] for x in (grad_out, q, memory_k, memory_v, dmemory_k)),
        **sizes,
        CHUNK=settings.head_chunk,
        R=settings.query_block,
        N=settings.slot_block,
        **settings.options,
    )
    return dq, dk, dv, dmemory_k, dmemory_v
