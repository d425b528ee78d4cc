"""The causal depthwise convolution over gated writes and its SiLU, with the product by W_x behind it.

u_k = silu(sum_i w_i window_i + bias),  the window being the last C inputs of writes that happened, the conv state before them

Rows are counted with time first, k B + b. W_x u is a sum over all of E: every program leaves the partial sum of its block, and
whoever needs the product adds them up.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import ceil_div, launch, padded_size
from smt_kernels.stride_write.blocks import BlockSettings, channels, load, settings, silu, store
from smt_kernels.stride_write.order import Order, fields_of, places, ranks
from smt_kernels.stride_write.reference import Weights
from smt_kernels.tiles import dot


@triton.jit
def taps_of(x, conv_state, strides_x, strides_conv, order, i_batch, o_rank, on, o_e, m_e, n_total, TAPS: tl.constexpr):
    """What each tap meets for each row, a tuple of [ROWS, E]: all are asked for before the first is used."""
    entries = ()
    for i in tl.static_range(TAPS):
        o_source = o_rank + i - (TAPS - 1)
        entries += (_tap(x, conv_state, strides_x, strides_conv, order, i_batch, o_source, on, o_e, m_e, n_total, TAPS - 1),)
    return entries


@triton.jit
def _tap(x, conv_state, strides_x, strides_conv, order, i_batch, o_rank, on, o_e, m_e, n_total, HISTORY: tl.constexpr):
    """The input of rank ``o_rank``, or, of the first writes alone, an entry of the conv state."""
    m_input, m_state = on & (o_rank >= 0), on & (o_rank < 0)
    o_step = places(order, i_batch, o_rank, m_input, n_total)
    p_x = x + (o_step * strides_x[0] + i_batch * strides_x[1])[:, None] + o_e[None, :]
    o_state = i_batch * strides_conv[0] + (HISTORY + o_rank).to(tl.int64) * strides_conv[2]
    p_state = conv_state + o_state[:, None] + (o_e * strides_conv[1])[None, :]
    return load(p_x, m_input[:, None] & m_e[None, :]) + load(p_state, m_state[:, None] & m_e[None, :])


@triton.jit(do_not_specialize=["first_write", "n_writes", "n_total", "stride_partials"])
def convolution_kernel(
    x, conv_state, rank, place, count, conv_weight, conv_bias, x_proj_weight, u, partials,
    strides_x, strides_conv, stride_partials, n_batch, first_write, n_writes, n_total, width,
    TAPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """u of ``ROWS`` rows and one block of E, 0 where the gate is off, and, unless ``partials`` is None, its share of W_x u."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_step, i_batch = first_write + o_row // n_batch, (o_row % n_batch).to(tl.int64)
    m_row = o_row < n_writes * n_batch
    order = rank, place, count
    o_rank, _ = ranks(order, i_batch, o_step, m_row, n_total)
    on = o_rank >= 0
    entries = taps_of(x, conv_state, strides_x, strides_conv, order, i_batch, o_rank, on, o_e, m_e, n_total, TAPS)
    b_conv = tl.zeros([ROWS, E], dtype=tl.float32) + load(conv_bias + o_e, m_e)[None, :]
    for i in tl.static_range(TAPS):
        b_conv += entries[i] * load(conv_weight + o_e * TAPS + i, m_e)[None, :]
    b_u = tl.where(on[:, None] & m_e[None, :], silu(b_conv), 0.0).to(u.dtype.element_ty)
    m_out = m_row[:, None] & m_e[None, :]
    o_out = (first_write * n_batch + o_row).to(tl.int64)
    tl.store(u + o_out[:, None] * width + o_e[None, :], b_u, mask=m_out)
    if partials is not None:
        o_p = tl.arange(0, P)
        p_weight = x_proj_weight + o_p[:, None] * width + o_e[None, :]
        b_weight = tl.load(p_weight, mask=(o_p < WIDE)[:, None] & m_e[None, :], other=0.0).to(b_u.dtype)  # [P, E]
        o_partial = tl.program_id(1).to(tl.int64) * stride_partials + o_row.to(tl.int64)[:, None] * WIDE
        p_partial = partials + o_partial + o_p[None, :]
        store(p_partial, dot(b_u, tl.trans(b_weight)), m_row[:, None] & (o_p < WIDE)[None, :])


# Rows of a block: the least that a dot takes.
ROWS = 16


def conv_blocks(x: Tensor) -> int:
    """How many partial sums of W_x u ``convolution`` leaves for x (K, B, E)."""
    return ceil_div(x.shape[2], conv_settings("convolution", x).width(ROWS))


def conv_settings(kernel: str, x: Tensor) -> BlockSettings:
    return settings(f"{kernel}_fp32" if x.dtype.itemsize == 4 else kernel, x.device)


def convolution(
    x: Tensor,
    conv_state: Tensor,
    order: Order | None,
    weights: Weights,
    u: Tensor,
    partials: Tensor | None,
    writes: range,
) -> None:
    """From x (K, B, E) with any strides and conv_state (B, E, C - 1), fill u (K, B, E) of ``writes`` of the K.

    ``partials`` (``conv_blocks``, len(writes), B, R + 2 N) get the partial sums of W_x u, in fp32; None: nobody needs them.
    """
    _, batch, width = x.shape
    chosen, wide = conv_settings("convolution", x), len(weights.x_proj_weight)
    block = chosen.width(ROWS)
    launch(
        convolution_kernel,
        (ceil_div(len(writes) * batch, ROWS), ceil_div(width, block)),
        x.device,
        **conv_inputs(x, conv_state, order, weights, writes),
        u=u,
        partials=partials,
        stride_partials=0 if partials is None else partials.stride(0),
        WIDE=wide,
        ROWS=ROWS,
        E=block,
        P=padded_size(wide),
        **chosen.options,
    )


def conv_inputs(x: Tensor, conv_state: Tensor, order: Order | None, weights: Weights, writes: range) -> dict[str, object]:
    """What both directions take."""
    n_total, batch, width = x.shape
    return {
        "x": x,
        "conv_state": conv_state,
        **fields_of(order),
        "conv_weight": weights.conv_weight,
        "conv_bias": weights.conv_bias,
        "x_proj_weight": weights.x_proj_weight,
        "strides_x": x.stride()[:2],
        "strides_conv": conv_state.stride(),
        "n_batch": batch,
        "first_write": writes.start,
        "n_writes": len(writes),
        "n_total": n_total,
        "width": width,
        "TAPS": weights.conv_weight.shape[1],
    }
