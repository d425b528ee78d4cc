"""One decoding step of stream attention in Triton: one program per row and key/value head, one softmax over both rings.

    out = softmax(scale q K^T) V

The query heads that share the keys are the rows of the products, padded to the 16 that a dot takes; so each key and value that
exists is read once, and none that does not.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import ceil_div, head_settings, launch, padded_size
from smt_kernels.stream_attention_decode.settings import TABLE
from smt_kernels.tiles import LOG2_E, attend, load, products, rows, store_normalised


@triton.jit(do_not_specialize=["n_kv_heads", "ring", "slot_ring"])
def _forward_kernel(
    q, k, v, memory_k, memory_v, n_tokens, n_slots, out,
    strides_q, strides_k, strides_v, strides_memory_k, strides_memory_v, strides_out, n_kv_heads, ring, slot_ring, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out of one batch row and the query heads of one key/value head. Counts larger than a ring count as all of it."""
    i_batch = (tl.program_id(0) // n_kv_heads).to(tl.int64)
    i_kv_head = tl.program_id(0) % n_kv_heads
    i_chunk = tl.program_id(1)
    log2_scale = scale * LOG2_E

    o_q = tl.arange(0, G)
    m_q = o_q < GROUP
    p_q = q + i_batch * strides_q[0] + (i_kv_head * GROUP + o_q) * strides_q[1]
    b_q = load(p_q, m_q, i_chunk, HEAD_DIM, CHUNK)  # [G, CHUNK]
    b_max = tl.full([G], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([G], dtype=tl.float32)
    b_out = tl.zeros([G, CHUNK], dtype=tl.float32)

    stop = tl.minimum(tl.load(n_slots + i_batch), slot_ring)
    for i_slot in range(0, stop, N):
        o_k = i_slot + tl.arange(0, N)
        m_k = o_k < stop
        p_k = rows(memory_k, strides_memory_k, i_batch, i_kv_head, o_k)
        b_k = load(p_k, m_k, i_chunk, HEAD_DIM, CHUNK)  # [N, CHUNK]
        b_v = load(rows(memory_v, strides_memory_v, i_batch, i_kv_head, o_k), m_k, i_chunk, HEAD_DIM, CHUNK)  # [N, CHUNK]
        b_s = products(b_q, p_q, m_q, b_k, p_k, m_k, i_chunk, HEAD_DIM, CHUNK) * log2_scale  # [G, N]
        b_max, b_sum, b_out = attend(b_max, b_sum, b_out, tl.where(m_k[None, :], b_s, float("-inf")), b_v)

    stop = tl.minimum(tl.load(n_tokens + i_batch), ring)
    for i_token in range(0, stop, K):
        o_k = i_token + tl.arange(0, K)
        m_k = o_k < stop
        p_k = rows(k, strides_k, i_batch, i_kv_head, o_k)
        b_k = load(p_k, m_k, i_chunk, HEAD_DIM, CHUNK)  # [K, CHUNK]
        b_v = load(rows(v, strides_v, i_batch, i_kv_head, o_k), m_k, i_chunk, HEAD_DIM, CHUNK)  # [K, CHUNK]
        b_s = products(b_q, p_q, m_q, b_k, p_k, m_k, i_chunk, HEAD_DIM, CHUNK) * log2_scale  # [G, K]
        b_max, b_sum, b_out = attend(b_max, b_sum, b_out, tl.where(m_k[None, :], b_s, float("-inf")), b_v)

    p_out = out + i_batch * strides_out[0] + (i_kv_head * GROUP + o_q) * strides_out[1]
    store_normalised(p_out, None, m_q, b_out, b_max, b_sum, i_chunk, HEAD_DIM, CHUNK)


def forward(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, n_tokens: Tensor, n_slots: Tensor, scale: float
) -> Tensor:
    """Returns (B, H, D); arguments as in the package docstring."""
    n_batch, n_heads, head_dim = q.shape
    ring, n_kv_heads = k.shape[1:3]
    out = q.new_empty(q.shape)
    settings = head_settings(TABLE, "stream_attention_decode", head_dim, q.dtype, q.device)
    launch(
        _forward_kernel,
        (n_batch * n_kv_heads, ceil_div(head_dim, settings.head_chunk)),
        q.device,
        *(q, k, v, memory_k, memory_v, n_tokens, n_slots, out),
        q.stride()[:2],
        *(x.stride()[:3] for x in (k, v, memory_k, memory_v)),
        out.stride()[:2],
        n_kv_heads=n_kv_heads,
        ring=ring,
        slot_ring=memory_k.shape[1],
        scale=scale,
        GROUP=n_heads // n_kv_heads,
        HEAD_DIM=head_dim,
        CHUNK=settings.head_chunk,
        G=padded_size(n_heads // n_kv_heads),
        K=min(settings.key_block, padded_size(ring)),
        N=min(settings.key_block, padded_size(memory_k.shape[1])),
        **settings.options,
    )
    return out
