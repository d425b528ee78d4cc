"""Window attention in Triton: one program per window and key/value head holds the whole score matrix, forward and backward.

    P = softmax(scale Q K^T);  O = P V
    dV = P^T dO;  dP = dO V^T;  dS = P * (dP - rowsum(P * dP));  dQ = scale dS K;  dK = scale dS^T Q

A window of W <= 128 entries is cut, from its right end, into one *main* block of at most 64 and a *remainder* on the left:
65 is 64 + 1, not a padded 128. The oldest entries are the remainder because of causality: main queries see both blocks, the
remainder's queries see only the remainder, and a tail of at most 64 queries lies in the main block entirely. Every
element of q, k, v and dO is read once, so that nothing is recomputed, no atomics are needed, and the row sums of the backward
pass come from registers instead of from O. The query heads that share a key/value head are looped over inside its program.

A head longer than ``CHUNK`` is split over the second grid axis: each program computes the scores over the whole head and
writes its own chunk of the results.

Names: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block of values, with its shape behind it. Q, K are the main blocks of
queries and keys, QR, KR the remainders. Visibility is that of ``WindowSpec.window_visible``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import architecture_family, ceil_div, head_settings, launch, padded_size
from smt_kernels.tiles import LOG2_E, base_two, dot, load, products, rows, store, store_normalised
from smt_kernels.window_attention.settings import TABLE

MAIN_BLOCK = 64


@triton.jit
def _first_entries(valid_memory, valid_tokens, i_window, n_memory, window):
    """Position of the first slot and of the first token that exist, both right-aligned in their half.

    Counts are not checked on a GPU: one too large counts as all; where it is of tokens, their half is the end of it anyway.
    """
    first_memory = 0
    if valid_memory is not None:
        first_memory = tl.maximum(n_memory - tl.load(valid_memory + i_window), 0)
    first_token = n_memory
    if valid_tokens is not None:
        first_token = window - tl.load(valid_tokens + i_window)
    return first_memory, first_token


@triton.jit
def _exists(o_key, n_memory, first_memory, first_token):
    """Which keys exist. A row of padding lies left of the window, hence before first_memory >= 0."""
    return o_key >= tl.where(o_key < n_memory, first_memory, first_token)


@triton.jit
def _hide(b_scores, o_query, o_key, m_key):
    """The scores with -inf where the key does not exist or is later than the query."""
    return tl.where(m_key & (o_key <= o_query), b_scores, float("-inf"))


@triton.jit(do_not_specialize=["n_memory", "window", "n_queries", "n_kv_heads"])
def _forward_kernel(
    q, k, v, out, lse, valid_memory, valid_tokens, strides_q, strides_k, strides_v, strides_out,
    n_memory, window, n_queries, n_kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
    Q: tl.constexpr, QR: tl.constexpr, K: tl.constexpr, KR: tl.constexpr, Q_BLOCKS: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v and lse = log(rowsum(exp(scale q k^T))) of one window and key/value head."""
    ORDINARY: tl.constexpr = HEAD_DIM > 64  # in fp32: three products of tf32 spill
    i_window = (tl.program_id(0) // n_kv_heads).to(tl.int64)
    i_kv_head = tl.program_id(0) % n_kv_heads
    i_chunk = tl.program_id(1)
    log2_scale = scale * LOG2_E
    first_memory, first_token = _first_entries(valid_memory, valid_tokens, i_window, n_memory, window)

    o_k = window - K + tl.arange(0, K)
    m_k = _exists(o_k, n_memory, first_memory, first_token)
    p_k = rows(k, strides_k, i_window, i_kv_head, o_k)
    b_k = load(p_k, m_k, i_chunk, HEAD_DIM, CHUNK)  # [K, CHUNK]
    b_v = load(rows(v, strides_v, i_window, i_kv_head, o_k), m_k, i_chunk, HEAD_DIM, CHUNK)  # [K, CHUNK]
    if KR > 0:
        o_kr = window - K - KR + tl.arange(0, KR)
        m_kr = _exists(o_kr, n_memory, first_memory, first_token)
        p_kr = rows(k, strides_k, i_window, i_kv_head, o_kr)
        b_kr = load(p_kr, m_kr, i_chunk, HEAD_DIM, CHUNK)  # [KR, CHUNK]
        b_vr = load(rows(v, strides_v, i_window, i_kv_head, o_kr), m_kr, i_chunk, HEAD_DIM, CHUNK)  # [KR, CHUNK]

    for i_block in range(GROUP * Q_BLOCKS):
        i_head = i_kv_head * GROUP + i_block // Q_BLOCKS
        p_lse = lse + (i_window * n_kv_heads * GROUP + i_head) * n_queries
        o_q = n_queries - (i_block % Q_BLOCKS + 1) * Q + tl.arange(0, Q)
        m_q = o_q >= 0
        o_position = o_q[:, None] + (window - n_queries)
        p_q = rows(q, strides_q, i_window, i_head, o_q)
        b_q = load(p_q, m_q, i_chunk, HEAD_DIM, CHUNK)  # [Q, CHUNK]
        b_s = products(b_q, p_q, m_q, b_k, p_k, m_k, i_chunk, HEAD_DIM, CHUNK, ORDINARY) * log2_scale  # [Q, K]
        b_s = _hide(b_s, o_position, o_k[None, :], m_k[None, :])
        b_max = tl.max(b_s, axis=1)
        if KR > 0:
            b_sr = products(b_q, p_q, m_q, b_kr, p_kr, m_kr, i_chunk, HEAD_DIM, CHUNK, ORDINARY) * log2_scale  # [Q, KR]
            b_sr = _hide(b_sr, o_position, o_kr[None, :], m_kr[None, :])
            b_max = tl.maximum(b_max, tl.max(b_sr, axis=1))
        b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_p = tl.exp2(b_s - b_max[:, None])  # [Q, K]
        b_sum = tl.sum(b_p, axis=1)
        b_out = dot(b_p.to(b_v.dtype), b_v, ORDINARY)  # [Q, CHUNK]
        if KR > 0:
            b_pr = tl.exp2(b_sr - b_max[:, None])  # [Q, KR]
            b_sum += tl.sum(b_pr, axis=1)
            b_out += dot(b_pr.to(b_vr.dtype), b_vr, ORDINARY)
        p_out = rows(out, strides_out, i_window, i_head, o_q)
        store_normalised(p_out, p_lse + o_q, m_q, b_out, b_max, b_sum, i_chunk, HEAD_DIM, CHUNK)

    if QR > 0:
        for i_group in range(GROUP):
            i_head = i_kv_head * GROUP + i_group
            p_lse = lse + (i_window * n_kv_heads * GROUP + i_head) * n_queries
            o_qr = n_queries - Q_BLOCKS * Q - QR + tl.arange(0, QR)
            m_qr = o_qr >= 0
            p_qr = rows(q, strides_q, i_window, i_head, o_qr)
            b_qr = load(p_qr, m_qr, i_chunk, HEAD_DIM, CHUNK)  # [QR, CHUNK]
            b_sr = products(b_qr, p_qr, m_qr, b_kr, p_kr, m_kr, i_chunk, HEAD_DIM, CHUNK, ORDINARY) * log2_scale  # [QR, KR]
            o_position = o_qr[:, None] + (window - n_queries)
            b_sr = _hide(b_sr, o_position, o_kr[None, :], m_kr[None, :])
            b_max = tl.max(b_sr, axis=1)
            b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
            b_pr = tl.exp2(b_sr - b_max[:, None])  # [QR, KR]
            b_out = dot(b_pr.to(b_vr.dtype), b_vr, ORDINARY)  # [QR, CHUNK]
            p_out = rows(out, strides_out, i_window, i_head, o_qr)
            store_normalised(p_out, p_lse + o_qr, m_qr, b_out, b_max, tl.sum(b_pr, axis=1), i_chunk, HEAD_DIM, CHUNK)


@triton.jit(do_not_specialize=["n_memory", "window", "n_queries", "n_kv_heads"])
def _backward_kernel(
    grad_out, q, k, v, lse, dq, dk, dv, valid_memory, valid_tokens,
    strides_grad_out, strides_q, strides_k, strides_v, strides_dq, strides_dk,
    n_memory, window, n_queries, n_kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
    Q: tl.constexpr, QR: tl.constexpr, K: tl.constexpr, KR: tl.constexpr, Q_BLOCKS: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one window and key/value head. Scores are (keys, queries), the transpose that dK and dV need."""
    ORDINARY: tl.constexpr = True  # in fp32: three products of tf32 spill 331 registers for heads of 64 on sm_90
    i_window = (tl.program_id(0) // n_kv_heads).to(tl.int64)
    i_kv_head = tl.program_id(0) % n_kv_heads
    i_chunk = tl.program_id(1)
    log2_scale = scale * LOG2_E
    first_memory, first_token = _first_entries(valid_memory, valid_tokens, i_window, n_memory, window)

    o_k = window - K + tl.arange(0, K)
    m_k = _exists(o_k, n_memory, first_memory, first_token)
    p_k = rows(k, strides_k, i_window, i_kv_head, o_k)
    p_v = rows(v, strides_v, i_window, i_kv_head, o_k)
    b_k = load(p_k, m_k, i_chunk, HEAD_DIM, CHUNK)  # [K, CHUNK]
    b_v = load(p_v, m_k, i_chunk, HEAD_DIM, CHUNK)  # [K, CHUNK]
    b_dk = tl.zeros([K, CHUNK], dtype=tl.float32)
    b_dv = tl.zeros([K, CHUNK], dtype=tl.float32)
    if KR > 0:
        o_kr = window - K - KR + tl.arange(0, KR)
        m_kr = _exists(o_kr, n_memory, first_memory, first_token)
        p_kr = rows(k, strides_k, i_window, i_kv_head, o_kr)
        p_vr = rows(v, strides_v, i_window, i_kv_head, o_kr)
        b_kr = load(p_kr, m_kr, i_chunk, HEAD_DIM, CHUNK)  # [KR, CHUNK]
        b_vr = load(p_vr, m_kr, i_chunk, HEAD_DIM, CHUNK)  # [KR, CHUNK]
        b_dkr = tl.zeros([KR, CHUNK], dtype=tl.float32)
        b_dvr = tl.zeros([KR, CHUNK], dtype=tl.float32)

    for i_block in range(GROUP * Q_BLOCKS):
        i_head = i_kv_head * GROUP + i_block // Q_BLOCKS
        p_lse = lse + (i_window * n_kv_heads * GROUP + i_head) * n_queries
        o_q = n_queries - (i_block % Q_BLOCKS + 1) * Q + tl.arange(0, Q)
        m_q = o_q >= 0
        o_position = o_q[None, :] + (window - n_queries)
        p_q = rows(q, strides_q, i_window, i_head, o_q)
        p_do = rows(grad_out, strides_grad_out, i_window, i_head, o_q)
        b_q = load(p_q, m_q, i_chunk, HEAD_DIM, CHUNK)  # [Q, CHUNK]
        b_do = load(p_do, m_q, i_chunk, HEAD_DIM, CHUNK)  # [Q, CHUNK]
        b_lse = base_two(tl.load(p_lse + o_q, mask=m_q, other=0.0))[None, :]  # [1, Q]
        b_s = products(b_k, p_k, m_k, b_q, p_q, m_q, i_chunk, HEAD_DIM, CHUNK, ORDINARY) * log2_scale  # [K, Q]
        b_p = tl.exp2(_hide(b_s, o_position, o_k[:, None], m_k[:, None]) - b_lse)  # [K, Q]
        b_dp = products(b_v, p_v, m_k, b_do, p_do, m_q, i_chunk, HEAD_DIM, CHUNK, ORDINARY)  # [K, Q]
        b_delta = tl.sum(b_p * b_dp, axis=0)
        if KR > 0:
            b_sr = products(b_kr, p_kr, m_kr, b_q, p_q, m_q, i_chunk, HEAD_DIM, CHUNK, ORDINARY) * log2_scale  # [KR, Q]
            b_pr = tl.exp2(_hide(b_sr, o_position, o_kr[:, None], m_kr[:, None]) - b_lse)  # [KR, Q]
            b_dpr = products(b_vr, p_vr, m_kr, b_do, p_do, m_q, i_chunk, HEAD_DIM, CHUNK, ORDINARY)  # [KR, Q]
            b_delta += tl.sum(b_pr * b_dpr, axis=0)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)  # [K, Q]
        b_dv += dot(b_p.to(b_do.dtype), b_do, ORDINARY)
        b_dk += dot(b_ds, b_q, ORDINARY)
        b_dq = dot(tl.trans(b_ds), b_k, ORDINARY)  # [Q, CHUNK]
        if KR > 0:
            b_dsr = (b_pr * (b_dpr - b_delta[None, :])).to(b_q.dtype)  # [KR, Q]
            b_dvr += dot(b_pr.to(b_do.dtype), b_do, ORDINARY)
            b_dkr += dot(b_dsr, b_q, ORDINARY)
            b_dq += dot(tl.trans(b_dsr), b_kr, ORDINARY)
        store(rows(dq, strides_dq, i_window, i_head, o_q), m_q, i_chunk, b_dq * scale, HEAD_DIM, CHUNK)

    if QR > 0:
        for i_group in range(GROUP):
            i_head = i_kv_head * GROUP + i_group
            p_lse = lse + (i_window * n_kv_heads * GROUP + i_head) * n_queries
            o_qr = n_queries - Q_BLOCKS * Q - QR + tl.arange(0, QR)
            m_qr = o_qr >= 0
            o_position = o_qr[None, :] + (window - n_queries)
            p_qr = rows(q, strides_q, i_window, i_head, o_qr)
            p_dor = rows(grad_out, strides_grad_out, i_window, i_head, o_qr)
            b_qr = load(p_qr, m_qr, i_chunk, HEAD_DIM, CHUNK)  # [QR, CHUNK]
            b_dor = load(p_dor, m_qr, i_chunk, HEAD_DIM, CHUNK)  # [QR, CHUNK]
            b_lse = base_two(tl.load(p_lse + o_qr, mask=m_qr, other=0.0))[None, :]  # [1, QR]
            b_sr = products(b_kr, p_kr, m_kr, b_qr, p_qr, m_qr, i_chunk, HEAD_DIM, CHUNK, ORDINARY) * log2_scale  # [KR, QR]
            b_pr = tl.exp2(_hide(b_sr, o_position, o_kr[:, None], m_kr[:, None]) - b_lse)  # [KR, QR]
            b_dpr = products(b_vr, p_vr, m_kr, b_dor, p_dor, m_qr, i_chunk, HEAD_DIM, CHUNK, ORDINARY)  # [KR, QR]
            b_dsr = (b_pr * (b_dpr - tl.sum(b_pr * b_dpr, axis=0)[None, :])).to(b_qr.dtype)  # [KR, QR]
            b_dvr += dot(b_pr.to(b_dor.dtype), b_dor, ORDINARY)
            b_dkr += dot(b_dsr, b_qr, ORDINARY)
            b_dqr = dot(tl.trans(b_dsr), b_kr, ORDINARY)  # [QR, CHUNK]
            store(rows(dq, strides_dq, i_window, i_head, o_qr), m_qr, i_chunk, b_dqr * scale, HEAD_DIM, CHUNK)

    store(rows(dk, strides_dk, i_window, i_kv_head, o_k), o_k >= 0, i_chunk, b_dk * scale, HEAD_DIM, CHUNK)
    store(rows(dv, strides_dk, i_window, i_kv_head, o_k), o_k >= 0, i_chunk, b_dv, HEAD_DIM, CHUNK)
    if KR > 0:
        store(rows(dk, strides_dk, i_window, i_kv_head, o_kr), o_kr >= 0, i_chunk, b_dkr * scale, HEAD_DIM, CHUNK)
        store(rows(dv, strides_dk, i_window, i_kv_head, o_kr), o_kr >= 0, i_chunk, b_dvr, HEAD_DIM, CHUNK)


def forward(
    q: Tensor, k: Tensor, v: Tensor, valid_memory: Tensor | None, valid_tokens: Tensor | None, n_memory: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q (N, T, H, D), k, v (N, W, H_kv, D) -> out (N, T, H, D), lse (N, H, T) in fp32, -inf where nothing is seen."""
    n_windows, n_queries, n_heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((n_windows, n_heads, n_queries), dtype=torch.float32)
    tensors = q, k, v, out, lse, valid_memory, valid_tokens
    strides = q.stride()[:3], k.stride()[:3], v.stride()[:3], out.stride()[:3]
    _launch("window_attention_forward", _forward_kernel, q, k, *tensors, *strides, n_memory=n_memory, scale=scale)
    return out, lse


def backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid_memory: Tensor | None,
    valid_tokens: Tensor | None,
    n_memory: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (N, T, H, D), k and v (N, W, H_kv, D), each in the dtype of its input."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    tensors = grad_out, q, k, v, lse, dq, dk, dv, valid_memory, valid_tokens
    strides = (x.stride()[:3] for x in (grad_out, q, k, v, dq, dk))
    _launch("window_attention_backward", _backward_kernel, q, k, *tensors, *strides, n_memory=n_memory, scale=scale)
    return dq, dk, dv


def _launch(
    name: str, kernel: triton.JITFunction, q: Tensor, k: Tensor, *arguments: object, n_memory: int, scale: float
) -> None:
    n_windows, n_queries, n_heads, head_dim = q.shape
    window, n_kv_heads = k.shape[1:3]
    settings = head_settings(TABLE, name, head_dim, q.dtype, q.device)
    main_queries, remainder_queries = _blocks(n_queries)
    query_block = min(main_queries, settings.query_block)
    if settings.num_warps > 4 and query_block == 16 and q.dtype.itemsize == 2 and architecture_family(q.device) == "hopper":
        # Eight warps on products with 16 rows have faulted there, in another kernel: docs/log.md, 26 November.
        settings = replace(settings, num_warps=4)
    main_keys, remainder_keys = _blocks(window)
    launch(
        kernel,
        (n_windows * n_kv_heads, ceil_div(head_dim, settings.head_chunk)),
        q.device,
        *arguments,
        n_memory=n_memory,
        window=window,
        n_queries=n_queries,
        n_kv_heads=n_kv_heads,
        scale=scale,
        GROUP=n_heads // n_kv_heads,
        HEAD_DIM=head_dim,
        CHUNK=settings.head_chunk,
        Q=query_block,
        QR=remainder_queries,
        K=main_keys,
        KR=remainder_keys,
        Q_BLOCKS=main_queries // query_block,
        **settings.options,
    )


def _blocks(length: int) -> tuple[int, int]:
    """Padded sizes of the main block and of the remainder, 0 where there is none, of ``length`` entries."""
    remainder = length - MAIN_BLOCK
    return padded_size(min(length, MAIN_BLOCK)), padded_size(remainder) if remainder > 0 else 0
