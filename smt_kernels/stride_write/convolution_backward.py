"""The gradients through W_x, SiLU and convolution, of writes of which all later ones are done."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import ceil_div, launch, padded_size, power_of_two
from smt_kernels.stride_write.blocks import channels, load, silu_gradient, store
from smt_kernels.stride_write.convolution import ROWS, conv_inputs, conv_settings, taps_of
from smt_kernels.stride_write.fold import fold
from smt_kernels.stride_write.order import Order, places, ranks
from smt_kernels.stride_write.reference import Weights
from smt_kernels.tiles import dot


@triton.jit(do_not_specialize=["first_write", "n_writes", "n_total"])
def convolution_backward_kernel(
    x, conv_state, rank, place, count, conv_weight, conv_bias, x_proj_weight, d_projected, grad_conv,
    d_u, d_x, d_taps,
    strides_x, strides_conv, strides_grad_conv, strides_d_x,
    n_batch, first_write, n_writes, n_total, width,
    TAPS: tl.constexpr, WIDE: tl.constexpr, ADDS: tl.constexpr,
    FOLDS: tl.constexpr, SPREADS: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradients through W_x, SiLU and convolution of ``ROWS / BATCH`` writes of ``BATCH`` rows and one block of E.

    ``FOLDS``: the gradient of the convolution's result takes the place of d_u; d_taps (programs, E, C + 1), taps and then bias,
    are partial sums, added to what is there if ``ADDS``. ``SPREADS``: that gradient goes on to the inputs, from all writes that
    they reached. One program can do both only if all later writes that its inputs reached are its own, or were done before.
    """
    n_tiles = tl.cdiv(n_batch, BATCH)
    o_local = tl.arange(0, ROWS)
    o_write = tl.program_id(0) // n_tiles * (ROWS // BATCH) + o_local // BATCH
    i_batch = tl.program_id(0) % n_tiles * BATCH + o_local % BATCH
    m_row = (o_write < n_writes) & (i_batch < n_batch)
    i_batch = i_batch.to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_step = first_write + o_write
    order = rank, place, count
    o_rank, n_on = ranks(order, i_batch, o_step, m_row, n_total)
    on = o_rank >= 0
    m_out = m_row[:, None] & m_e[None, :]
    o_row = o_step.to(tl.int64) * n_batch + i_batch
    p_du = d_u + o_row[:, None] * width + o_e[None, :]
    if FOLDS:
        o_p = tl.arange(0, P)
        m_p = m_row[:, None] & (o_p < WIDE)[None, :]
        o_projected = (o_write.to(tl.int64) * n_batch + i_batch)[:, None] * WIDE + o_p[None, :]
        entries = taps_of(x, conv_state, strides_x, strides_conv, order, i_batch, o_rank, on, o_e, m_e, n_total, TAPS)
        b_projected = tl.load(d_projected + o_projected, mask=m_p, other=0.0)  # [ROWS, P]
        p_weight = x_proj_weight + o_p[:, None] * width + o_e[None, :]
        b_weight = tl.load(p_weight, mask=(o_p < WIDE)[:, None] & m_e[None, :], other=0.0)  # [P, E]
        b_du = load(p_du, m_out) + dot(b_projected, b_weight.to(b_projected.dtype))  # [ROWS, E]
        b_conv = tl.zeros([ROWS, E], dtype=tl.float32) + load(conv_bias + o_e, m_e)[None, :]
        for i in tl.static_range(TAPS):
            b_conv += entries[i] * load(conv_weight + o_e * TAPS + i, m_e)[None, :]
        b_dconv = tl.where(on[:, None] & m_e[None, :], b_du * silu_gradient(b_conv), 0.0)
        store(p_du, b_dconv, m_out)
        o_taps = (tl.program_id(0).to(tl.int64) * width + o_e) * (TAPS + 1)
        for i in tl.static_range(TAPS + 1):
            b_sum = tl.sum(b_dconv * entries[i] if i < TAPS else b_dconv, axis=0)
            if ADDS:
                b_sum += load(d_taps + o_taps + i, m_e)
            store(d_taps + o_taps + i, b_sum, m_e)
    if FOLDS and SPREADS:
        tl.debug_barrier()  # a thread reads what another one has written
    if SPREADS:
        b_dx = tl.zeros([ROWS, E], dtype=tl.float32)
        for i in tl.static_range(TAPS):
            m_reached = on & (o_rank + i < n_on)
            o_reached = places(order, i_batch, o_rank + i, m_reached, n_total) * n_batch + i_batch
            b_reached = load(d_u + o_reached[:, None] * width + o_e[None, :], m_reached[:, None] & m_e[None, :])
            b_dx += b_reached * load(conv_weight + o_e * TAPS + TAPS - 1 - i, m_e)[None, :]
        if grad_conv is not None:
            o_kept = (o_rank - n_on + TAPS - 1).to(tl.int64)
            p_grad = grad_conv + (i_batch * strides_grad_conv[0] + o_kept * strides_grad_conv[2])[:, None]
            b_dx += load(p_grad + (o_e * strides_grad_conv[1])[None, :], (on & (o_kept >= 0))[:, None] & m_e[None, :])
        o_k = o_step.to(tl.int64)
        store(d_x + (o_k * strides_d_x[0] + i_batch * strides_d_x[1])[:, None] + o_e[None, :], b_dx, m_out)


def convolution_backward(
    x: Tensor,
    conv_state: Tensor,
    order: Order | None,
    weights: Weights,
    partials: Tensor,
    grad_conv: Tensor | None,
    d_u: Tensor,
    d_projected: Tensor,
    d_x: Tensor,
    d_taps: Tensor,
    writes: range,
    *,
    adds: bool,
) -> None:
    """Gradients of ``writes`` of the K, of which later ones are done.

    Fills d_projected (len(writes), B, R + 2 N), the sum of ``partials`` (any number, *d_projected.shape), d_x (K, B, E; any
    strides) and d_taps (``tap_sums``, E, C + 1), and puts those of the convolution's result into d_u (K, B, E).
    """
    _, batch, width = x.shape
    wide, whole = len(weights.x_proj_weight), len(writes) <= WHOLE
    rows, batch_block = _tile(len(writes), batch)
    chosen = conv_settings("convolution_backward", x)
    block = max(chosen.width(rows), ROWS)
    arguments = conv_inputs(x, conv_state, order, weights, writes)
    fold(partials, d_projected)
    arguments |= {"grad_conv": grad_conv, "d_u": d_u, "d_projected": d_projected}
    arguments |= {"d_x": d_x, "d_taps": d_taps, "strides_d_x": d_x.stride()[:2]}
    arguments |= {"strides_grad_conv": (0, 0, 0) if grad_conv is None else grad_conv.stride()}
    arguments |= {"WIDE": wide, "ADDS": adds, "ROWS": rows, "BATCH": batch_block}
    arguments |= {"E": block, "P": padded_size(wide), **chosen.options}
    grid = tap_sums(len(writes), batch), ceil_div(width, block)
    for folds, spreads in [(True, True)] if whole else [(True, False), (False, True)]:
        launch(convolution_backward_kernel, grid, x.device, **arguments, FOLDS=folds, SPREADS=spreads)


# Most writes that one program of the backward pass has whole.
WHOLE = 32


def _tile(n_writes: int, batch: int) -> tuple[int, int]:
    """Rows that a program of the backward pass has, and of how many batch rows they are."""
    if n_writes > WHOLE:
        return ROWS, 1
    steps = power_of_two(n_writes)
    batch_block = max(ROWS // steps, 1)
    return steps * batch_block, batch_block


def tap_sums(n_writes: int, batch: int) -> int:
    """How many partial sums of the gradients of taps and bias ``convolution_backward`` leaves."""
    rows, batch_block = _tile(n_writes, batch)
    return ceil_div(n_writes, rows // batch_block) * ceil_div(batch, batch_block)
