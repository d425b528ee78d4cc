"""Stream attention in Triton, forward; ``backward_kernels`` has the backward.

    O = softmax(scale Q K^T) V    over the slots and tokens that each query sees

One program computes 64 rows, or 128 where heads share keys: the queries of consecutive steps, with the heads that share a
key/value head side by side. The keys that any of its rows sees are one run of slots and one run of tokens; it loads these and
no others, block by block, into an online softmax.

Why 64 rows. Per query and head, with window 15 + 50, stride 16 and one query head per key head, in rows of the head: the least
is q, k, v, out and 2/16 of a slot, 4.1. A program of R rows reads 2 (R + 49) / R tokens and about 2 (R / 16 + 15) / R slots
besides its q and out, and multiplies each query with these keys in whole blocks, of which it sees 65:

    R = 32    8.1 rows, 2.0 x the least     96 + 32 keys, 2.0 x the visible
    R = 64    6.1 rows, 1.5 x              128 + 32 keys, 2.5 x
    R = 128   5.1 rows, 1.2 x              192 + 32 keys, 3.4 x

With 2 or 4 query heads per key head 64 rows are 32 or 16 queries, 1.6 x and 1.7 x; so grouped heads take 128 rows, 1.3 x.
Cutting the rows of a larger program into smaller blocks of queries saves products, but reads the keys once per block. Slots
come in blocks of 32: a block of 64 would hold 19 slots and bring the products to 3.0 x.

Steps are counted from the last write before the first key and slots with them (``geometry``), so that they fit 32 bits however
long the stream is. Visibility is that of ``WindowSpec``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import ceil_div, head_settings, launch
from smt_kernels.stream_attention.backward_kernels import backward
from smt_kernels.stream_attention.geometry import SIZES, arguments, slot_visible, slots_seen, token_visible, tokens_seen
from smt_kernels.stream_attention.settings import TABLE
from smt_kernels.tiles import LOG2_E, attend, load, products, rows, store_normalised
from smt_kernels.window import WindowSpec

__all__ = ["backward", "forward"]


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    q, k, v, memory_k, memory_v, out, lse,
    strides_q, strides_k, strides_v, strides_memory_k, strides_memory_v, strides_out,
    n_queries, n_keys, n_slots, first_query, first_slot, n_memory, n_tokens, n_kv_heads, scale,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out and lse = log(rowsum(exp(scale q k^T))) of R rows; a row is a query and one head of its group."""
    n_blocks = tl.cdiv(n_queries * GROUP, R)
    i_row = tl.program_id(0) % n_blocks * R
    i_batch = (tl.program_id(0) // n_blocks // n_kv_heads).to(tl.int64)
    i_kv_head = tl.program_id(0) // n_blocks % n_kv_heads
    i_chunk = tl.program_id(1)
    log2_scale = scale * LOG2_E

    o_row = i_row + tl.arange(0, R)
    o_query = o_row // GROUP
    m_q = o_query < n_queries
    o_head = i_kv_head * GROUP + o_row % GROUP
    p_q = rows(q, strides_q, i_batch, o_head, o_query)
    b_q = load(p_q, m_q, i_chunk, HEAD_DIM, CHUNK)  # [R, CHUNK]
    b_max = tl.full([R], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([R], dtype=tl.float32)
    b_out = tl.zeros([R, CHUNK], dtype=tl.float32)

    i_first = i_row // GROUP
    i_last = tl.minimum((i_row + R - 1) // GROUP, n_queries - 1)
    start, stop = slots_seen(i_first, i_last, n_slots, first_query, first_slot, n_memory, STRIDE)
    for i_slot in range(start, stop, N):
        o_k = i_slot + tl.arange(0, N)
        m_k = o_k < stop
        p_k = rows(memory_k, strides_memory_k, i_batch, i_kv_head, o_k)
        b_k = load(p_k, m_k, i_chunk, HEAD_DIM, CHUNK)  # [N, CHUNK]
        b_v = load(rows(memory_v, strides_memory_v, i_batch, i_kv_head, o_k), m_k, i_chunk, HEAD_DIM, CHUNK)  # [N, CHUNK]
        b_s = products(b_q, p_q, m_q, b_k, p_k, m_k, i_chunk, HEAD_DIM, CHUNK) * log2_scale  # [R, N]
        visible = slot_visible(o_query[:, None], o_k[None, :], stop, first_query, first_slot, n_memory, STRIDE)
        b_max, b_sum, b_out = attend(b_max, b_sum, b_out, tl.where(visible, b_s, float("-inf")), b_v)

    start, stop = tokens_seen(i_first, i_last, n_queries, n_keys, n_tokens)
    for i_token in range(start, stop, K):
        o_k = i_token + tl.arange(0, K)
        m_k = o_k < stop
        p_k = rows(k, strides_k, i_batch, i_kv_head, o_k)
        b_k = load(p_k, m_k, i_chunk, HEAD_DIM, CHUNK)  # [K, CHUNK]
        b_v = load(rows(v, strides_v, i_batch, i_kv_head, o_k), m_k, i_chunk, HEAD_DIM, CHUNK)  # [K, CHUNK]
        b_s = products(b_q, p_q, m_q, b_k, p_k, m_k, i_chunk, HEAD_DIM, CHUNK) * log2_scale  # [R, K]
        visible = token_visible(o_query[:, None], o_k[None, :], stop, n_queries, n_keys, n_tokens)
        b_max, b_sum, b_out = attend(b_max, b_sum, b_out, tl.where(visible, b_s, float("-inf")), b_v)

    p_lse = lse + (i_batch * n_kv_heads * GROUP + o_head) * n_queries + o_query
    p_out = rows(out, strides_out, i_batch, o_head, o_query)
    store_normalised(p_out, p_lse, m_q, b_out, b_max, b_sum, i_chunk, HEAD_DIM, CHUNK)


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
    """Returns out (B, T, H, D) and lse (B, H, T) in fp32; arguments as in the package docstring."""
    n_batch, n_queries, n_heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((n_batch, n_heads, n_queries), dtype=torch.float32)
    sizes = arguments(q, k, memory_k, window, first_step, first_slot)
    kernel = "stream_attention_forward" if sizes["GROUP"] == 1 else "stream_attention_forward_grouped"
    settings = head_settings(TABLE, kernel, head_dim, q.dtype, q.device)
    n_blocks = ceil_div(n_queries * sizes["GROUP"], settings.query_block)
    tensors = q, k, v, memory_k, memory_v, out
    launch(
        _forward_kernel,
        (n_blocks * n_batch * k.shape[2], ceil_div(head_dim, settings.head_chunk)),
        q.device,
        *tensors,
        lse,
        *(x.stride()[:3] for x in tensors),
        **sizes,
        scale=scale,
        HEAD_DIM=head_dim,
        CHUNK=settings.head_chunk,
        R=settings.query_block,
        K=settings.key_block,
        N=settings.slot_block,
        **settings.options,
    )
    return out, lse
