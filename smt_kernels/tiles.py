"""Triton functions that the attention kernels share: tiles of rows by head dimensions, their products, and the softmax.

A tile holds one chunk of the head, [rows, CHUNK]. A head longer than ``CHUNK`` is split over programs: each computes the scores
over the whole head and writes its own chunk of the results. Exponentials are taken in base 2, which is what the hardware has.
Names: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block of values, with its shape behind it.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton.language.target_info import is_cuda
from triton.runtime.jit import constexpr_function

from smt_kernels import precision

LOG2_E: tl.constexpr = tl.constexpr(precision.LOG2_E)
LN_2: tl.constexpr = tl.constexpr(math.log(2.0))


@triton.jit
def rows(pointer, strides, i_batch, i_head, o_row):
    """Pointers to the first element of each row, in 64 bits; ``strides`` are those of batch, row and head."""
    return pointer + i_batch * strides[0] + tl.cast(i_head, tl.int64) * strides[2] + o_row.to(tl.int64) * strides[1]


@triton.jit
def load(p_rows, m_rows, i_chunk, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk of the head from each row; zeros beyond the rows and beyond the head."""
    o_head = i_chunk * CHUNK + tl.arange(0, CHUNK)
    mask = m_rows[:, None]
    if HEAD_DIM % CHUNK != 0:
        mask = mask & (o_head < HEAD_DIM)[None, :]
    return tl.load(p_rows[:, None] + o_head[None, :], mask=mask, other=0.0)  # [rows, CHUNK]


@triton.jit
def store(p_rows, m_rows, i_chunk, b_value, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """The inverse of ``load``, in the dtype of the memory."""
    o_head = i_chunk * CHUNK + tl.arange(0, CHUNK)
    mask = m_rows[:, None]
    if HEAD_DIM % CHUNK != 0:
        mask = mask & (o_head < HEAD_DIM)[None, :]
    tl.store(p_rows[:, None] + o_head[None, :], b_value.to(p_rows.dtype.element_ty), mask=mask)


@constexpr_function
def precision_of_single(ordinary):
    """How products of fp32 are formed: on NVIDIA's matrix units as three of tf32, which together err as little as one and take
    a quarter of the time, or on ordinary units, where a kernel has no registers for the three. CDNA has ordinary ones alone.
    """
    return "tf32x3" if is_cuda() and not ordinary else "ieee"


@triton.jit
def dot(b_x, b_y, ORDINARY: tl.constexpr = False):
    """x y, accumulated in fp32; ``ORDINARY`` units are for fp32 alone."""
    return tl.dot(b_x, b_y, input_precision=precision_of_single(ORDINARY))


@triton.jit
def products(
    b_x, p_x, m_x, b_y, p_y, m_y, i_chunk,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, ORDINARY: tl.constexpr = False,
):  # fmt: skip
    """x y^T over the whole head: the chunks at hand, then the others."""
    b_products = dot(b_x, tl.trans(b_y), ORDINARY)  # [rows of x, rows of y]
    CHUNKS: tl.constexpr = (HEAD_DIM + CHUNK - 1) // CHUNK
    for i in tl.static_range(1, CHUNKS):
        i_other = (i_chunk + i) % CHUNKS
        b_other_x = load(p_x, m_x, i_other, HEAD_DIM, CHUNK)  # [rows of x, CHUNK]
        b_other_y = load(p_y, m_y, i_other, HEAD_DIM, CHUNK)  # [rows of y, CHUNK]
        b_products += dot(b_other_x, tl.trans(b_other_y), ORDINARY)
    return b_products


@triton.jit
def row_products(b_x, p_x, b_y, p_y, m_rows, i_chunk, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """rowsum(x * y) in fp32 over the whole head: the chunks at hand, then the others."""
    b_sums = tl.sum(b_x.to(tl.float32) * b_y.to(tl.float32), axis=1)  # [rows]
    CHUNKS: tl.constexpr = (HEAD_DIM + CHUNK - 1) // CHUNK
    for i in tl.static_range(1, CHUNKS):
        i_other = (i_chunk + i) % CHUNKS
        b_other_x = load(p_x, m_rows, i_other, HEAD_DIM, CHUNK).to(tl.float32)  # [rows, CHUNK]
        b_other_y = load(p_y, m_rows, i_other, HEAD_DIM, CHUNK).to(tl.float32)  # [rows, CHUNK]
        b_sums += tl.sum(b_other_x * b_other_y, axis=1)
    return b_sums


@triton.jit
def attend(b_max, b_sum, b_out, b_s, b_v):
    """One step of the online softmax: take in keys with scores ``b_s`` (base 2, -inf where hidden) and values ``b_v``.

    Of all keys so far, ``b_max`` is the largest score of each row, ``b_sum`` the sum of exp2(score - b_max), and ``b_out`` that
    sum with each term times its value.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1))
    # A row that has seen nothing yet has no maximum to subtract: -inf - -inf would be nan.
    b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_p = tl.exp2(b_s - b_shift[:, None])  # [rows, keys]
    b_rescale = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_rescale + tl.sum(b_p, axis=1)
    b_out = b_out * b_rescale[:, None] + dot(b_p.to(b_v.dtype), b_v)  # [rows, CHUNK]
    return b_new_max, b_sum, b_out


@triton.jit
def store_normalised(p_out, p_lse, m_rows, b_out, b_max, b_sum, i_chunk, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Divide by the row sums and store, with the log-sum-exp unless ``p_lse`` is None; who sees nothing gets zeros and -inf."""
    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    store(p_out, m_rows, i_chunk, b_out / b_divisor[:, None], HEAD_DIM, CHUNK)
    if p_lse is not None:
        b_lse = tl.where(b_sum == 0.0, float("-inf"), (b_max + tl.log2(b_divisor)) * LN_2)
        if i_chunk == 0:
            tl.store(p_lse, b_lse, mask=m_rows)


@triton.jit
def base_two(b_lse):
    """The log-sum-exp in base 2, and 0 where nothing is seen, so that exp2(-inf - lse) is 0 there and not nan."""
    return tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2_E)
