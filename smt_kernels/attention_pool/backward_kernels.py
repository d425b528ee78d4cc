"""The two backward launches of attention pooling: the gradient of each window's u, then, given that of its mean, of entries.

    dw = dropout (dpooled . x^) + da;   delta = a . dw;   du = scale ((a dw) X^ - delta a X^)
    dx^ = (a dropout)^T dpooled + (scale a (dw - delta))^T u + average^T dmean;   dx = (dx^ - x^ mean(x^ dx^)) / rms(x)

The first is over strips, like the forward launches; the two sums of du need not wait for delta. In the second each program owns
E tokens or slots and gathers from all windows that see them: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smt_kernels.attention_pool.forward_kernels import VARYING, inverse_rms, normalised, normalised_products, square_sums
from smt_kernels.attention_pool.strips import (
    place_of,
    rows,
    rows_of,
    seen,
    shared_blocks,
    shared_entries,
    starts,
    strip,
    windows_that_see,
)
from smt_kernels.tiles import dot, load, row_products, store


@triton.jit(do_not_specialize=VARYING)
def query_backward_kernel(
    tokens, slots, exists, grad_pooled, grad_weights, weights, dropout, mean, du, d_weights, delta, share,
    strides_tokens, strides_slots, strides_place, stride_exists, strides_grad, scale,
    windows_of_strip, n_windows, n_tokens, n_memory, held_tokens, held_slots, token_start, stride, slot_start, phase, group,
    NORMALISE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dw, delta and du of the windows of a strip, and the share of an entry in each mean, 1 / (number of entries)."""
    # One for each warp, but for chunks of 256, which the compilers of triton 3.6 to 3.8 would then squeeze into 128 registers.
    SLICES: tl.constexpr = 8 if CHUNK > 256 else min(4, CHUNK // 16)
    i_chunk = tl.program_id(1)
    i_row, first, stop, o_window, m_window, o_place = strip(n_windows, windows_of_strip, strides_place, P)
    timeline = token_start, stride, slot_start, phase, group
    o_token, o_slot = starts(o_window, *timeline)
    source = tokens, slots, strides_tokens, strides_slots
    held = n_tokens, n_memory, held_tokens, held_slots, exists, i_row * stride_exists
    p_grad = rows(grad_pooled, strides_grad, i_row, o_window)
    b_grad = load(p_grad, m_window, i_chunk, WIDTH, CHUNK)  # [P, CHUNK]
    o_weights = (o_place * (n_memory + n_tokens))[:, None]
    # dw less what it would be if all entries were their mean: du is a sum over differences from an average, which the rounding
    # of a dw would drown where entries are alike. Dropout's factors make them differ, and may leave nothing to subtract from.
    b_common = tl.zeros([P], dtype=tl.float32)
    if dropout is None:
        p_mean = mean + o_place * WIDTH
        b_mean = load(p_mean, m_window, i_chunk, WIDTH, CHUNK)  # [P, CHUNK]
        b_common = row_products(b_grad, p_grad, b_mean, p_mean, m_window, i_chunk, WIDTH, CHUNK)
    b_seen = tl.zeros([P, E], dtype=tl.float32)
    b_along = tl.zeros([P, E], dtype=tl.float32)  # a . dw
    b_du = tl.zeros([P, CHUNK], dtype=tl.float32)
    b_average = tl.zeros([P, CHUNK], dtype=tl.float32)  # a X^
    shared_slots, shared_tokens, slot_blocks, n_blocks = shared_blocks(first, stop, n_tokens, n_memory, *timeline, E)
    for i_block in range(n_blocks):
        is_slot, o_index, m_x, p_x = shared_entries(i_block, slot_blocks, shared_slots, shared_tokens, i_row, source, held, E)
        o_position, _, m_seen = seen(
            is_slot, o_index[None, :], o_token[:, None], o_slot[:, None], m_window[:, None], held
        )  # [P, E]
        b_x = load(p_x, m_x, i_chunk, WIDTH, CHUNK)  # [E, CHUNK]
        b_dw, b_inverse = normalised_products(b_grad, p_grad, m_window, b_x, p_x, m_x, i_chunk, WIDTH, CHUNK, NORMALISE, SLICES)
        if dropout is not None:
            b_dw *= tl.load(dropout + o_weights + o_position, mask=m_seen, other=0.0).to(tl.float32)
        if grad_weights is not None:
            b_dw += tl.load(grad_weights + o_weights + o_position, mask=m_seen, other=0.0).to(tl.float32)
        if i_chunk == 0:
            tl.store(d_weights + o_weights + o_position, b_dw, mask=m_seen)
        b_a = tl.load(weights + o_weights + o_position, mask=m_seen, other=0.0)  # [P, E]
        b_dw -= b_common[:, None]
        b_x = normalised(b_x, b_inverse, NORMALISE)
        b_seen += m_seen.to(tl.float32)
        b_along += b_a * b_dw
        b_du += dot((b_a * b_dw).to(b_x.dtype), b_x)
        b_average += dot(b_a.to(b_x.dtype), b_x)
    b_count, b_delta = tl.sum(b_seen, axis=1), tl.sum(b_along, axis=1)
    store(du + o_place * WIDTH, m_window, i_chunk, (b_du - b_delta[:, None] * b_average) * scale, WIDTH, CHUNK)
    if i_chunk == 0:
        tl.store(delta + o_place, b_delta + b_common, mask=m_window)
        tl.store(share + o_place, 1.0 / tl.maximum(b_count, 1.0), mask=m_window)


@triton.jit
def _gather(
    is_slot, o_index, i_row, first, stop, held, timeline, saved, strides_place, strides_grad, scale, i_chunk,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One chunk of dx^ of E entries from the windows ``first`` to ``stop``, and by how many windows each entry is seen."""
    grad_pooled, u, d_mean, weights, d_weights, delta, share, dropout = saved
    n_tokens, n_memory = held[0], held[1]
    b_dx = tl.zeros([E, CHUNK], dtype=tl.float32)
    b_seen = tl.zeros([E], dtype=tl.int32)
    for i_start in range(first, stop, P):
        o_window = i_start + tl.arange(0, P)
        m_window = o_window < stop
        o_place = place_of(i_row, o_window, strides_place)
        o_token, o_slot = starts(o_window, *timeline)
        o_position, _, m_seen = seen(
            is_slot, o_index[:, None], o_token[None, :], o_slot[None, :], m_window[None, :], held
        )  # [E, P]
        o_weights = (o_place * (n_memory + n_tokens))[None, :] + o_position
        b_a = tl.load(weights + o_weights, mask=m_seen, other=0.0)  # [E, P]
        b_dw = tl.load(d_weights + o_weights, mask=m_seen, other=0.0)  # [E, P]
        b_ds = b_a * (b_dw - tl.load(delta + o_place, mask=m_window, other=0.0)[None, :]) * scale
        b_share = tl.where(m_seen, tl.load(share + o_place, mask=m_window, other=0.0)[None, :], 0.0)  # [E, P]
        if dropout is not None:
            b_a *= tl.load(dropout + o_weights, mask=m_seen, other=0.0).to(tl.float32)
        b_grad = load(rows(grad_pooled, strides_grad, i_row, o_window), m_window, i_chunk, WIDTH, CHUNK)  # [P, CHUNK]
        b_u = load(u + o_place * WIDTH, m_window, i_chunk, WIDTH, CHUNK)  # [P, CHUNK]
        b_d_mean = load(d_mean + o_place * WIDTH, m_window, i_chunk, WIDTH, CHUNK)  # [P, CHUNK]
        b_dx += dot(b_a.to(b_grad.dtype), b_grad)
        b_dx += dot(b_ds.to(b_u.dtype), b_u)
        b_dx += dot(b_share.to(b_d_mean.dtype), b_d_mean)
        b_seen += tl.sum(m_seen.to(tl.int32), axis=1)
    return b_dx, b_seen


@triton.jit(do_not_specialize=VARYING)
def entries_backward_kernel(
    tokens, slots, exists, grad_pooled, u, d_mean, weights, d_weights, delta, share, dropout, d_tokens, d_slots,
    strides_tokens, strides_slots, strides_place, stride_exists, strides_grad, strides_d_tokens, strides_d_slots, scale,
    n_windows, n_tokens, n_memory, held_tokens, held_slots, token_start, stride, slot_start, phase, group,
    NORMALISE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, E: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """dx of E tokens or E slots of a row; the programs of a row's tokens come first. Zeros where no window sees an entry.

    ``ADDS``: it is added to what is there.
    """
    token_blocks = tl.cdiv(held_tokens, E)
    n_blocks = token_blocks + tl.cdiv(held_slots, E)
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    i_block = tl.program_id(0) % n_blocks
    i_chunk = tl.program_id(1)
    is_slot = i_block >= token_blocks
    i_first = tl.where(is_slot, i_block - token_blocks, i_block) * E
    o_index = i_first + tl.arange(0, E)
    p_x = rows_of(is_slot, slots, tokens, strides_slots, strides_tokens, i_row, o_index)
    p_dx = rows_of(is_slot, d_slots, d_tokens, strides_d_slots, strides_d_tokens, i_row, o_index)

    timeline = token_start, stride, slot_start, phase, group
    held = n_tokens, n_memory, held_tokens, held_slots, exists, i_row * stride_exists
    saved = grad_pooled, u, d_mean, weights, d_weights, delta, share, dropout
    first, stop = windows_that_see(i_first, i_first + E - 1, is_slot, n_windows, n_tokens, n_memory, *timeline)
    b_dx, b_seen = _gather(
        is_slot, o_index, i_row, first, stop, held, timeline, saved, strides_place, strides_grad, scale,
        i_chunk, WIDTH, CHUNK, P, E,
    )  # fmt: skip
    if NORMALISE:
        b_x = load(p_x, b_seen > 0, i_chunk, WIDTH, CHUNK).to(tl.float32)  # [E, CHUNK]
        b_squares, b_along = square_sums(b_x), tl.sum(b_x * b_dx, axis=1)
        CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
        for i in range(1, CHUNKS):
            i_other = (i_chunk + i) % CHUNKS
            b_other_dx, _ = _gather(
                is_slot, o_index, i_row, first, stop, held, timeline, saved, strides_place, strides_grad,
                scale, i_other, WIDTH, CHUNK, P, E,
            )  # fmt: skip
            b_other = load(p_x, b_seen > 0, i_other, WIDTH, CHUNK).to(tl.float32)  # [E, CHUNK]
            b_squares += square_sums(b_other)
            b_along += tl.sum(b_other * b_other_dx, axis=1)
        b_inverse = inverse_rms(b_squares, WIDTH, NORMALISE)
        b_dx = (b_dx - b_x * (b_inverse * b_inverse * b_along / WIDTH)[:, None]) * b_inverse[:, None]
    m_held = o_index < tl.where(is_slot, held_slots, held_tokens)
    if ADDS:
        b_dx += load(p_dx, m_held, i_chunk, WIDTH, CHUNK).to(tl.float32)
    store(p_dx, m_held, i_chunk, b_dx, WIDTH, CHUNK)
