"""Small kernels, right and wrong, that the tests of the testing kit run. Import only where triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl

from smt_kernels.stride_write.blocks import softplus


@triton.jit
def dot(x, y, out, N: tl.constexpr):
    o = tl.arange(0, N)
    o_tile = o[:, None] * N + o[None, :]
    tl.store(out + o_tile, tl.dot(tl.load(x + o_tile), tl.load(y + o_tile), input_precision="ieee"))


@triton.jit
def cast(x, out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out + o, tl.load(x + o).to(out.dtype.element_ty))


@triton.jit
def arithmetic(x, y, sums, products, differences, smaller, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x, b_y = tl.load(x + o), tl.load(y + o)
    tl.store(sums + o, b_x + b_y)
    tl.store(products + o, b_x * b_y)
    tl.store(differences + o, b_x - 1.0)
    tl.store(smaller + o, (b_x < b_y).to(tl.int32))


@triton.jit
def row_sum(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), axis=0))


@triton.jit
def _linear(a_left, b_left, a_right, b_right):
    return a_left * a_right, b_left * a_right + b_right


@triton.jit
def linear_recurrence(a, b, out, last, T: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr):
    """out_t = a_t out_(t-1) + b_t along the first of two dimensions, and the same by a reduction, which keeps the last only."""
    o_tile = tl.arange(0, T)[:, None] * N + tl.arange(0, N)[None, :]
    b_a, b_b = tl.load(a + o_tile), tl.load(b + o_tile)
    _, b_out = tl.associative_scan((b_a, b_b), 0, _linear, reverse=REVERSE)
    tl.store(out + o_tile, b_out)
    _, b_last = tl.reduce((b_a, b_b), 0, _linear)
    tl.store(last + tl.arange(0, N), b_last)


@triton.jit
def add_one(x, out, length, BLOCK: tl.constexpr, SHIFT: tl.constexpr = 0):
    """out = x + 1; a SHIFT moves every access, out of bounds at one end."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o, tl.load(x + o + SHIFT, mask=o < length) + 1, mask=o < length)


@triton.jit
def shifted_in_place(x, BLOCK: tl.constexpr):
    """Each program writes the first element of the next program's block: a race."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + o + 1, tl.load(x + o))


@triton.jit
def total(x, out, BLOCK: tl.constexpr):
    """The sum of all blocks by atomics, whose order nobody knows."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out, tl.sum(tl.load(x + o), axis=0))


@triton.jit
def fill_where(flag, out, length, N: tl.constexpr):
    """1 in the first half where the flag is on, 2 in the second where two numbers compare."""
    o = tl.arange(0, N)
    tl.store(out + o, tl.full([N], 1.0, tl.float32), mask=(o < N // 2) & tl.load(flag))
    tl.store(out + o, tl.full([N], 2.0, tl.float32), mask=(o >= N // 2) & (length < N))


@triton.jit
def sum_over(x, out, rows: tl.constexpr, columns: tl.constexpr, AXIS: tl.constexpr):
    b_x = tl.load(x + tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :])
    b_sum = tl.sum(b_x, axis=AXIS)
    tl.store(out + tl.arange(0, columns if AXIS == 0 else rows), b_sum)


@triton.jit
def _double(b_x):
    return b_x + b_x


@triton.jit
def doubled_often(x, out, TIMES: tl.constexpr):
    b_x = tl.load(x + tl.program_id(0))
    for _ in tl.static_range(TIMES):
        b_x = _double(b_x)
    tl.store(out + tl.program_id(0), b_x)


@triton.jit
def softplus_of(x, out, N: tl.constexpr):
    o_x = tl.arange(0, N)
    tl.store(out + o_x, softplus(tl.load(x + o_x)))
