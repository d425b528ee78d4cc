"""The two forward launches of attention pooling: the mean of each window, then, given u, its weights and what they pool.

    mean_p = average of the x^ that window p sees;   a = softmax(u . x^ / sqrt(d_k));   pooled = (a dropout) X^

A program owns one strip and one chunk of the width, and reads each entry of the strip once, E at a time, in both launches; the
softmax is computed as the entries come (Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

import triton
import triton.language as tl

from smt_kernels.attention_pool.strips import Strips, seen, shared_blocks, shared_entries, starts, strip
from smt_kernels.precision import NORM_EPS
from smt_kernels.tiles import LOG2_E, dot, load, store

EPS: tl.constexpr = tl.constexpr(NORM_EPS)
# They change from call to call; compiling anew where one happens to be 1 or a multiple of 16 would not pay.
VARYING = ["windows_of_strip", *Strips._fields[1:], "stride_exists"]


@triton.jit
def square_sums(b_x):
    b_x = b_x.to(tl.float32)
    return tl.sum(b_x * b_x, axis=1)


@triton.jit
def inverse_rms(b_squares, WIDTH: tl.constexpr, NORMALISE: tl.constexpr):
    """The factor that normalises an entry, from the sum of its squares; 1 without normalisation."""
    return tl.rsqrt(b_squares / WIDTH + EPS) if NORMALISE else tl.full(b_squares.shape, 1.0, dtype=tl.float32)


@triton.jit
def normalised(b_x, b_inverse, NORMALISE: tl.constexpr):
    """x^, rounded to the dtype of x: with 1 / rms(x) in their coefficients instead, fp16 products could overflow."""
    return (b_x * b_inverse[:, None]).to(b_x.dtype) if NORMALISE else b_x


@triton.jit
def _long_dot(b_y, b_x, CHUNK: tl.constexpr, SLICES: tl.constexpr):
    """y x^T, small and long: cut into slices, or else several warps would compute the same of it."""
    b_y = tl.permute(tl.reshape(b_y, [b_y.shape[0], SLICES, CHUNK // SLICES]), [1, 0, 2])
    b_x = tl.permute(tl.reshape(b_x, [b_x.shape[0], SLICES, CHUNK // SLICES]), [1, 2, 0])
    return tl.sum(dot(b_y, b_x), axis=0)


@triton.jit
def normalised_products(
    b_y, p_y, m_y, b_x, p_x, m_x, i_chunk,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, NORMALISE: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """y x^^T and 1 / rms(x) over the whole width: the chunks at hand, then the others."""
    b_products = _long_dot(b_y, b_x, CHUNK, SLICES)  # [rows of y, rows of x]
    b_squares = square_sums(b_x)
    CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    for i in range(1, CHUNKS):
        i_other = (i_chunk + i) % CHUNKS
        b_other = load(p_x, m_x, i_other, WIDTH, CHUNK)  # [rows of x, CHUNK]
        b_other_y = load(p_y, m_y, i_other, WIDTH, CHUNK)  # [rows of y, CHUNK]
        b_squares += square_sums(b_other)  # before the product, which can then release it from registers
        b_products += _long_dot(b_other_y, b_other, CHUNK, SLICES)
    b_inverse = inverse_rms(b_squares, WIDTH, NORMALISE)
    return b_products * b_inverse[None, :], b_inverse


@triton.jit(do_not_specialize=VARYING)
def mean_kernel(
    tokens, slots, exists, mean, strides_tokens, strides_slots, strides_place, stride_exists,
    windows_of_strip, n_windows, n_tokens, n_memory, held_tokens, held_slots, token_start, stride, slot_start, phase, group,
    NORMALISE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """mean = average of the normalised entries that each window of a strip sees."""
    i_chunk = tl.program_id(1)
    i_row, first, stop, o_window, m_window, o_place = strip(n_windows, windows_of_strip, strides_place, P)
    timeline = token_start, stride, slot_start, phase, group
    o_token, o_slot = starts(o_window, *timeline)
    source = tokens, slots, strides_tokens, strides_slots
    held = n_tokens, n_memory, held_tokens, held_slots, exists, i_row * stride_exists
    b_sum = tl.zeros([P, CHUNK], dtype=tl.float32)
    b_seen = tl.zeros([P, E], dtype=tl.float32)
    shared_slots, shared_tokens, slot_blocks, n_blocks = shared_blocks(first, stop, n_tokens, n_memory, *timeline, E)
    for i_block in range(n_blocks):
        is_slot, o_index, m_x, p_x = shared_entries(i_block, slot_blocks, shared_slots, shared_tokens, i_row, source, held, E)
        _, _, m_seen = seen(is_slot, o_index[None, :], o_token[:, None], o_slot[:, None], m_window[:, None], held)  # [P, E]
        b_x = load(p_x, m_x, i_chunk, WIDTH, CHUNK)  # [E, CHUNK]
        if NORMALISE:
            b_squares = square_sums(b_x)
            CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
            for i in range(1, CHUNKS):
                b_squares += square_sums(load(p_x, m_x, (i_chunk + i) % CHUNKS, WIDTH, CHUNK))
            b_x = normalised(b_x, inverse_rms(b_squares, WIDTH, NORMALISE), NORMALISE)
        b_sum += dot(m_seen.to(b_x.dtype), b_x)
        b_seen += m_seen.to(tl.float32)  # summed over E after the loop, in which threads then need not meet for it
    b_count = tl.maximum(tl.sum(b_seen, axis=1), 1.0)[:, None]
    store(mean + o_place * WIDTH, m_window, i_chunk, b_sum / b_count, WIDTH, CHUNK)


@triton.jit(do_not_specialize=VARYING)
def pool_kernel(
    tokens, slots, exists, u, dropout, pooled, weights, strides_tokens, strides_slots, strides_place, stride_exists,
    scale,
    windows_of_strip, n_windows, n_tokens, n_memory, held_tokens, held_slots, token_start, stride, slot_start, phase, group,
    NORMALISE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """weights = softmax(scale u . x^) and pooled = (weights dropout) X^ of the windows of a strip."""
    SLICES: tl.constexpr = 8 if CHUNK > 128 else min(4, CHUNK // 16)  # one for each warp
    i_chunk = tl.program_id(1)
    i_row, first, stop, o_window, m_window, o_place = strip(n_windows, windows_of_strip, strides_place, P)
    timeline = token_start, stride, slot_start, phase, group
    o_token, o_slot = starts(o_window, *timeline)
    source = tokens, slots, strides_tokens, strides_slots
    held = n_tokens, n_memory, held_tokens, held_slots, exists, i_row * stride_exists
    p_u = u + o_place * WIDTH
    b_u = load(p_u, m_window, i_chunk, WIDTH, CHUNK)  # [P, CHUNK]
    o_weights = (o_place * (n_memory + n_tokens))[:, None]
    b_max = tl.full([P], float("-inf"), dtype=tl.float32)
    b_exponentials = tl.zeros([P, E], dtype=tl.float32)
    b_pooled = tl.zeros([P, CHUNK], dtype=tl.float32)
    shared_slots, shared_tokens, slot_blocks, n_blocks = shared_blocks(first, stop, n_tokens, n_memory, *timeline, E)
    for i_block in range(n_blocks):
        is_slot, o_index, m_x, p_x = shared_entries(i_block, slot_blocks, shared_slots, shared_tokens, i_row, source, held, E)
        o_position, m_inside, m_seen = seen(
            is_slot, o_index[None, :], o_token[:, None], o_slot[:, None], m_window[:, None], held
        )  # [P, E]
        b_x = load(p_x, m_x, i_chunk, WIDTH, CHUNK)  # [E, CHUNK]
        b_s, b_inverse = normalised_products(b_u, p_u, m_window, b_x, p_x, m_x, i_chunk, WIDTH, CHUNK, NORMALISE, SLICES)
        b_s = tl.where(m_seen, b_s * (scale * LOG2_E), float("-inf"))  # [P, E]
        if i_chunk == 0:
            tl.store(weights + o_weights + o_position, b_s, mask=m_inside)
        b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1))
        # A window that has seen nothing yet has no maximum to subtract: -inf - -inf would be nan.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_s - b_shift[:, None])  # [P, E]
        b_rescale = tl.exp2(b_max - b_shift)
        b_exponentials = b_exponentials * b_rescale[:, None] + b_p
        if dropout is not None:
            b_p *= tl.load(dropout + o_weights + o_position, mask=m_seen, other=0.0).to(tl.float32)
        b_pooled = b_pooled * b_rescale[:, None] + dot(b_p.to(b_x.dtype), normalised(b_x, b_inverse, NORMALISE))
        b_max = b_new_max
    # Windows beyond the last are not stored; they have no sum to divide by.
    b_divisor = tl.where(m_window, tl.sum(b_exponentials, axis=1), 1.0)[:, None]
    store(pooled + o_place * WIDTH, m_window, i_chunk, b_pooled / b_divisor, WIDTH, CHUNK)

    if i_chunk == 0:
        tl.debug_barrier()  # each thread reads scores that other threads of this program have stored
        # Where registers are plenty; chunks of 256 are squeezed into 128 of them.
        STEP: tl.constexpr = 4 * E if CHUNK > 256 else E
        for i_start in range(0, n_memory + n_tokens, STEP):
            o_position = i_start + tl.arange(0, STEP)[None, :]
            mask = m_window[:, None] & (o_position < n_memory + n_tokens)
            p_weights = weights + o_weights + o_position
            b_s = tl.load(p_weights, mask=mask, other=float("-inf"))  # [P, STEP]
            b_max_or_zero = tl.where(m_window, b_max, 0.0)[:, None]
            tl.store(p_weights, tl.exp2(b_s - b_max_or_zero) / b_divisor, mask=mask)
