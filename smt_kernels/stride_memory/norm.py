"""A residual and the RMSNorm of the sum in one launch, forward and backward.

x = x + update;   normed = x r w,  r = rsqrt(mean(x^2) + eps)
dx = residual + r (g - x r^2 mean(g x)),  g = dnormed w;   dw = sum of dnormed x r
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import compiler_options, launch, power_of_two
from smt_kernels.precision import NORM_EPS
from smt_kernels.stride_write.blocks import load, store

EPS: tl.constexpr = tl.constexpr(NORM_EPS)
# Most programs of a backward launch, each of which leaves a partial sum of dw.
PROGRAMS = 256


@triton.jit
def _norm_kernel(
    x, update, weight, total, normed, out, strides_out, n_batch,
    WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One row; ``out`` gets the same as ``normed`` in the place of its write and batch row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, D)
    m_d = o_d < WIDTH
    b_x = load(x + i_row * WIDTH + o_d, m_d)  # [D]
    if update is not None:
        b_x += load(update + i_row * WIDTH + o_d, m_d)
    store(total + i_row * WIDTH + o_d, b_x, m_d)
    b_normed = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) / WIDTH + EPS) * load(weight + o_d, m_d)
    if normed is not None:
        store(normed + i_row * WIDTH + o_d, b_normed, m_d)
    if out is not None:
        store(out + i_row // n_batch * strides_out[0] + i_row % n_batch * strides_out[1] + o_d, b_normed, m_d)


@triton.jit(do_not_specialize=["n_rows"])
def _norm_backward_kernel(
    d_normed, x, weight, residual, d_x, d_x_narrow, d_weight, n_rows, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Every row of which the number, divided by that of programs, leaves the number of this one."""
    o_d = tl.arange(0, D)
    m_d = o_d < WIDTH
    b_weight = load(weight + o_d, m_d)
    p_weight = d_weight + tl.program_id(0).to(tl.int64) * WIDTH + o_d
    b_dweight = load(p_weight, m_d)
    o_row = tl.program_id(0).to(tl.int64) * WIDTH + o_d
    for _ in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        b_x, b_grad = load(x + o_row, m_d), load(d_normed + o_row, m_d)
        b_residual = tl.zeros([D], dtype=tl.float32)
        if residual is not None:
            b_residual = load(residual + o_row, m_d)
        b_dx = b_grad * b_weight
        # Neither sum waits for the other.
        b_square, b_product = tl.sum(b_x * b_x, axis=0), tl.sum(b_dx * b_x, axis=0)
        b_inverse = tl.rsqrt(b_square / WIDTH + EPS)
        b_dweight += b_grad * b_x * b_inverse
        b_dx = (b_dx - b_x * (b_inverse * b_inverse * b_product / WIDTH)) * b_inverse + b_residual
        store(d_x + o_row, b_dx, m_d)
        store(d_x_narrow + o_row, b_dx, m_d)
        o_row += tl.num_programs(0) * WIDTH
    store(p_weight, b_dweight, m_d)


def add_and_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    total: Tensor,
    normed: Tensor | None,
    out: Tensor | None = None,
) -> None:
    """Fill total = x + update and its norm, all (rows, d); ``out`` (K, B, d; any strides) gets the norm too."""
    strides, n_batch = ((0, 0), 1) if out is None else (out.stride()[:2], out.shape[1])
    results = {"total": total, "normed": normed, "out": out, "strides_out": strides, "n_batch": n_batch}
    launch(_norm_kernel, (len(x),), x.device, x=x, update=update, weight=weight, **results, **_sizes(x))


def norm_backward(
    d_normed: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    d_x: Tensor,
    d_x_narrow: Tensor,
    d_weight: Tensor,
) -> None:
    """Fill d_x and, in its dtype, d_x_narrow, (rows, d), and add to d_weight (``weight_sums``, d); ``residual`` may be d_x."""
    grads = {"d_normed": d_normed, "residual": residual, "d_x": d_x, "d_x_narrow": d_x_narrow, "d_weight": d_weight}
    grid = (weight_sums(len(x)),)
    launch(_norm_backward_kernel, grid, x.device, x=x, weight=weight, **grads, n_rows=len(x), **_sizes(x))


def weight_sums(n_rows: int) -> int:
    """How many partial sums of the gradient of the weight ``norm_backward`` leaves."""
    return min(n_rows, PROGRAMS)


def _sizes(x: Tensor) -> dict[str, int | bool]:
    width = x.shape[-1]
    return {"WIDTH": width, "D": power_of_two(width), **compiler_options(num_warps=4, num_stages=1)}
