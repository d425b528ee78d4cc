"""The causal depthwise convolution over gated writes and its SiLU, with the product by W_x behind it, forward and backward.

u_k = silu(sum_i w_i window_i + bias),  the window being the last C inputs of writes that happened, the conv state before them

Every input is read where it lies, by index: which of a row's writes happened, and in which order, is a table (``Order``), so
that all writes are computed at once. Rows are counted with time first, k B + b. W_x u is a sum over all of E: every program
leaves the partial sum of its block, and whoever needs the product adds them up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import launch, padded_size
from smt_kernels.stride_write.blocks import BlockSettings, channels, load, settings, silu, silu_gradient, store
from smt_kernels.stride_write.reference import Weights
from smt_kernels.tiles import dot


class Order(NamedTuple):
    """Which writes of each row happen, counted: None where all do."""

    rank: Tensor  # (B, K) int32, how many happen before each one that does; -1 where the gate is off
    place: Tensor  # (B, K) int32, where each of those that happen stands; behind them, anything
    count: Tensor  # (B,) int32, how many happen


def order_of(gate: Tensor | None) -> Order | None:
    """The order of the writes of ``gate`` (B, K), in a few operations and without reading anything back."""
    if gate is None:
        return None
    passed = gate.cumsum(1, dtype=torch.int32)
    place = (~gate).to(torch.uint8).argsort(dim=1, stable=True)
    return Order(torch.where(gate, passed - 1, -1).contiguous(), place.to(torch.int32).contiguous(), passed[:, -1].contiguous())


@triton.jit
def _ranks(order, i_batch, o_step, m_step, n_total):
    """The rank of each write of a row, -1 where it does not happen, and how many of the row happen."""
    rank, _, count = order
    if rank is not None:
        o_rank = tl.load(rank + i_batch * n_total + o_step, mask=m_step, other=-1)
        n_on = tl.load(count + i_batch, mask=m_step, other=0)
    else:
        o_rank = tl.where(m_step, o_step, -1)
        n_on = tl.where(m_step, n_total, 0)
    return o_rank, n_on


@triton.jit
def _place(order, i_batch, o_rank, mask, n_total):
    """Where the writes of some ranks stand."""
    _, place, _ = order
    if place is not None:
        o_rank = tl.load(place + i_batch * n_total + o_rank, mask=mask, other=0)
    return o_rank.to(tl.int64)


@triton.jit
def _tap(x, conv_state, strides_x, strides_conv, order, i_batch, o_rank, on, o_e, m_e, n_total, HISTORY: tl.constexpr):
    """What one tap meets for each row, [ROWS, E]: the input of rank ``o_rank``, or an entry of the conv state."""
    m_input, m_state = on & (o_rank >= 0), on & (o_rank < 0)
    o_step = _place(order, i_batch, o_rank, m_input, n_total)
    p_x = x + (o_step * strides_x[0] + i_batch * strides_x[1])[:, None] + o_e[None, :]
    o_state = i_batch * strides_conv[0] + (HISTORY + o_rank).to(tl.int64) * strides_conv[2]
    p_state = conv_state + o_state[:, None] + (o_e * strides_conv[1])[None, :]
    b_x = load(p_x, m_input[:, None] & m_e[None, :])
    if tl.max(m_state.to(tl.int32), axis=0) > 0:  # of the first writes alone
        b_x += load(p_state, m_state[:, None] & m_e[None, :])
    return b_x


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
    o_rank, _ = _ranks(order, i_batch, o_step, m_row, n_total)
    on = o_rank >= 0
    b_conv = tl.zeros([ROWS, E], dtype=tl.float32) + load(conv_bias + o_e, m_e)[None, :]
    for i in tl.static_range(TAPS):
        o_source = o_rank + i - (TAPS - 1)
        b_x = _tap(x, conv_state, strides_x, strides_conv, order, i_batch, o_source, on, o_e, m_e, n_total, TAPS - 1)
        b_conv += b_x * load(conv_weight + o_e * TAPS + i, m_e)[None, :]
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


@triton.jit
def summed_rows(pointers, stride, mask, PARTIALS: tl.constexpr):
    """The sum of ``PARTIALS`` partial sums of a wide block, four of them on the way at a time."""
    b_sum = tl.zeros(pointers.shape, dtype=tl.float32)
    for i in range(0, PARTIALS, 4):
        for j in tl.static_range(4):
            b_sum += load(pointers, mask & (i + j < PARTIALS))
            pointers += stride
    return b_sum


@triton.jit(do_not_specialize=["first_write", "n_writes", "n_total", "stride_partials"])
def convolution_backward_kernel(
    x, conv_state, rank, place, count, conv_weight, conv_bias, x_proj_weight, partials, grad_conv,
    d_u, d_projected, d_x, d_taps,
    strides_x, strides_conv, strides_grad_conv, strides_d_x, stride_partials,
    n_batch, first_write, n_writes, n_total, width,
    TAPS: tl.constexpr, WIDE: tl.constexpr, PARTIALS: tl.constexpr, ADDS: tl.constexpr,
    FOLDS: tl.constexpr, SPREADS: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradients through W_x, SiLU and convolution of ``ROWS / BATCH`` writes of ``BATCH`` rows and one block of E.

    ``FOLDS``: the partial sums are added up to d_projected; the gradient of the convolution's result takes the place of d_u;
    d_taps (programs, E, C + 1), taps and then bias, are partial sums, added to what is there if ``ADDS``. ``SPREADS``: that
    gradient goes on to the inputs, from all writes that they reached. One program can do both only if all later writes that
    its inputs reached are its own, or were done before.
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
    o_rank, n_on = _ranks(order, i_batch, o_step, m_row, n_total)
    on = o_rank >= 0
    m_out = m_row[:, None] & m_e[None, :]
    o_row = o_step.to(tl.int64) * n_batch + i_batch
    p_du = d_u + o_row[:, None] * width + o_e[None, :]
    if FOLDS:
        o_p = tl.arange(0, P)
        m_p = m_row[:, None] & (o_p < WIDE)[None, :]
        o_projected = (o_write.to(tl.int64) * n_batch + i_batch)[:, None] * WIDE + o_p[None, :]
        b_projected = summed_rows(partials + o_projected, stride_partials, m_p, PARTIALS).to(d_projected.dtype.element_ty)
        if tl.program_id(1) == 0:
            tl.store(d_projected + o_projected, b_projected, mask=m_p)
        p_weight = x_proj_weight + o_p[:, None] * width + o_e[None, :]
        b_weight = tl.load(p_weight, mask=(o_p < WIDE)[:, None] & m_e[None, :], other=0.0)  # [P, E]
        b_du = load(p_du, m_out) + dot(b_projected, b_weight.to(b_projected.dtype))  # [ROWS, E]
        b_conv = tl.zeros([ROWS, E], dtype=tl.float32) + load(conv_bias + o_e, m_e)[None, :]
        for i in tl.static_range(TAPS):
            o_source = o_rank + i - (TAPS - 1)
            b_x = _tap(x, conv_state, strides_x, strides_conv, order, i_batch, o_source, on, o_e, m_e, n_total, TAPS - 1)
            b_conv += b_x * load(conv_weight + o_e * TAPS + i, m_e)[None, :]
        b_dconv = tl.where(on[:, None] & m_e[None, :], b_du * silu_gradient(b_conv), 0.0)
        store(p_du, b_dconv, m_out)
        o_taps = (tl.program_id(0).to(tl.int64) * width + o_e) * (TAPS + 1)
        for i in tl.static_range(TAPS + 1):
            b_sum = tl.sum(b_dconv, axis=0)
            if i < TAPS:
                o_source = o_rank + i - (TAPS - 1)
                b_x = _tap(x, conv_state, strides_x, strides_conv, order, i_batch, o_source, on, o_e, m_e, n_total, TAPS - 1)
                b_sum = tl.sum(b_dconv * b_x, axis=0)
            if ADDS:
                b_sum += load(d_taps + o_taps + i, m_e)
            store(d_taps + o_taps + i, b_sum, m_e)
    if FOLDS and SPREADS:
        tl.debug_barrier()  # a thread reads what another one has written
    if SPREADS:
        b_dx = tl.zeros([ROWS, E], dtype=tl.float32)
        for i in tl.static_range(TAPS):
            m_reached = on & (o_rank + i < n_on)
            o_reached = _place(order, i_batch, o_rank + i, m_reached, n_total) * n_batch + i_batch
            b_reached = load(d_u + o_reached[:, None] * width + o_e[None, :], m_reached[:, None] & m_e[None, :])
            b_dx += b_reached * load(conv_weight + o_e * TAPS + TAPS - 1 - i, m_e)[None, :]
        if grad_conv is not None:
            o_kept = (o_rank - n_on + TAPS - 1).to(tl.int64)
            p_grad = grad_conv + (i_batch * strides_grad_conv[0] + o_kept * strides_grad_conv[2])[:, None]
            b_dx += load(p_grad + (o_e * strides_grad_conv[1])[None, :], (on & (o_kept >= 0))[:, None] & m_e[None, :])
        o_k = o_step.to(tl.int64)
        store(d_x + (o_k * strides_d_x[0] + i_batch * strides_d_x[1])[:, None] + o_e[None, :], b_dx, m_out)


@triton.jit(do_not_specialize=["n_total"])
def conv_state_kernel(
    x, conv_state, rank, place, count, new_conv_state, strides_x, strides_conv, n_batch, n_total, width,
    HISTORY: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The last C - 1 inputs of one row of one layer: of writes that happened, or the older ones of the conv state."""
    i_layer, i_batch = (tl.program_id(0) // n_batch).to(tl.int64), (tl.program_id(0) % n_batch).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    n_on = n_total + tl.zeros([], dtype=tl.int32)
    if count is not None:
        n_on = tl.load(count + i_batch)
    p_conv = conv_state + i_layer * strides_conv[0] + i_batch * strides_conv[1] + o_e * strides_conv[2]
    p_new = new_conv_state + (tl.program_id(0).to(tl.int64) * width + o_e) * HISTORY
    for i in tl.static_range(HISTORY):
        i_rank = n_on - HISTORY + i
        i_step = i_rank
        if place is not None:
            i_step = tl.load(place + i_batch * n_total + tl.maximum(i_rank, 0))
        p_x = x + i_layer * strides_x[0] + i_step.to(tl.int64) * strides_x[1] + i_batch * strides_x[2] + o_e
        b_old = load(p_conv + (HISTORY + i_rank) * strides_conv[3], m_e & (i_rank < 0))
        store(p_new + i, tl.where(i_rank < 0, b_old, load(p_x, m_e & (i_rank >= 0))), m_e)


@triton.jit(do_not_specialize=["n_total"])
def conv_state_backward_kernel(
    d_conv, grad_conv, rank, place, count, conv_weight, d_conv_state, strides_grad_conv, n_batch, n_total, width,
    HISTORY: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The gradient of the conv state of one row of one layer: from the first writes, and from what is left of it behind all."""
    i_layer, i_batch = (tl.program_id(0) // n_batch).to(tl.int64), (tl.program_id(0) % n_batch).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    n_on = n_total + tl.zeros([], dtype=tl.int32)
    if count is not None:
        n_on = tl.load(count + i_batch)
    p_out = d_conv_state + (tl.program_id(0).to(tl.int64) * width + o_e) * HISTORY
    for i in tl.static_range(HISTORY):
        b_sum = tl.zeros([E], dtype=tl.float32)
        for i_rank in tl.static_range(i + 1):
            exists = i_rank < n_on
            i_step = i_rank
            if place is not None:
                i_step = tl.load(place + i_batch * n_total + i_rank, mask=exists, other=0)
            p_grad = d_conv + ((i_layer * n_total + i_step) * n_batch + i_batch) * width + o_e
            p_weight = conv_weight + (i_layer * width + o_e) * (HISTORY + 1) + i - i_rank
            b_sum += load(p_grad, m_e & exists) * load(p_weight, m_e)
        if grad_conv is not None:
            p_grad = grad_conv + i_layer * strides_grad_conv[0] + i_batch * strides_grad_conv[1] + o_e * strides_grad_conv[2]
            b_sum += load(p_grad + (i - n_on) * strides_grad_conv[3], m_e & (i >= n_on))
        store(p_out + i, b_sum, m_e)


# Rows of a block: the least that a dot takes.
ROWS = 16


def conv_blocks(x: Tensor) -> int:
    """How many partial sums of W_x u ``convolution`` leaves for x (K, B, E)."""
    return triton.cdiv(x.shape[2], _settings("convolution", x).width(ROWS))


def _settings(kernel: str, x: Tensor) -> BlockSettings:
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
    chosen, wide = _settings("convolution", x), len(weights.x_proj_weight)
    block = chosen.width(ROWS)
    launch(
        convolution_kernel,
        (triton.cdiv(len(writes) * batch, ROWS), triton.cdiv(width, block)),
        x.device,
        **_inputs(x, conv_state, order, weights, writes),
        u=u,
        partials=partials,
        stride_partials=0 if partials is None else partials.stride(0),
        WIDE=wide,
        ROWS=ROWS,
        E=block,
        P=padded_size(wide),
        **chosen.options,
    )


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
    """Gradients of ``writes`` of the K, of which later ones are done: fills d_projected (len(writes), B, R + 2 N), d_x
    (K, B, E; any strides) and d_taps (``tap_sums``, E, C + 1), and puts those of the convolution's result into d_u (K, B, E).
    """
    _, batch, width = x.shape
    wide, whole = len(weights.x_proj_weight), len(writes) <= WHOLE
    rows, batch_block = _tile(len(writes), batch)
    chosen = _settings("convolution_backward", x)
    block = max(chosen.width(rows), ROWS)
    arguments = _inputs(x, conv_state, order, weights, writes)
    arguments |= {"partials": partials, "stride_partials": partials.stride(0), "grad_conv": grad_conv, "d_u": d_u}
    arguments |= {"d_projected": d_projected, "d_x": d_x, "d_taps": d_taps, "strides_d_x": d_x.stride()[:2]}
    arguments |= {"strides_grad_conv": (0, 0, 0) if grad_conv is None else grad_conv.stride()}
    arguments |= {"WIDE": wide, "PARTIALS": len(partials), "ADDS": adds, "ROWS": rows, "BATCH": batch_block}
    arguments |= {"E": block, "P": padded_size(wide), **chosen.options}
    grid = tap_sums(len(writes), batch), triton.cdiv(width, block)
    for folds, spreads in [(True, True)] if whole else [(True, False), (False, True)]:
        launch(convolution_backward_kernel, grid, x.device, **arguments, FOLDS=folds, SPREADS=spreads)


# Most writes that one program of the backward pass has whole.
WHOLE = 32


def _tile(n_writes: int, batch: int) -> tuple[int, int]:
    """Rows that a program of the backward pass has, and of how many batch rows they are."""
    if n_writes > WHOLE:
        return ROWS, 1
    steps = triton.next_power_of_2(n_writes)
    batch_block = max(ROWS // steps, 1)
    return steps * batch_block, batch_block


def tap_sums(n_writes: int, batch: int) -> int:
    """How many partial sums of the gradients of taps and bias ``convolution_backward`` leaves."""
    rows, batch_block = _tile(n_writes, batch)
    return triton.cdiv(n_writes, rows // batch_block) * triton.cdiv(batch, batch_block)


def conv_states(x: Tensor, conv_state: Tensor, order: Order | None, new_conv_state: Tensor) -> None:
    """From x (L, K, B, E) and conv_state (L, B, E, C - 1) to those after K writes."""
    layers, n_total, batch, width = x.shape
    if conv_state.shape[3]:
        arguments = {"x": x, "conv_state": conv_state, "new_conv_state": new_conv_state}
        arguments |= {"strides_x": x.stride()[:3], "strides_conv": conv_state.stride()}
        _launch_states(conv_state_kernel, layers, n_total, batch, width, order, arguments, conv_state)


def conv_states_backward(
    d_conv: Tensor, grad_conv: Tensor | None, order: Order | None, conv_weight: Tensor, d_conv_state: Tensor
) -> None:
    """From the gradients of the convolution's results (L, K, B, E) and of the new states to those of the old (L, B, E, C - 1).

    ``conv_weight`` is (L, E, C).
    """
    layers, n_total, batch, width = d_conv.shape
    if d_conv_state.shape[3]:
        arguments = {"d_conv": d_conv, "grad_conv": grad_conv, "conv_weight": conv_weight, "d_conv_state": d_conv_state}
        arguments |= {"strides_grad_conv": (0, 0, 0, 0) if grad_conv is None else grad_conv.stride()}
        _launch_states(conv_state_backward_kernel, layers, n_total, batch, width, order, arguments, d_conv_state)


def _launch_states(
    kernel: triton.JITFunction,
    layers: int,
    n_total: int,
    batch: int,
    width: int,
    order: Order | None,
    arguments: dict[str, object],
    state: Tensor,
) -> None:
    chosen = settings("conv_state", state.device)
    block = chosen.width(1)
    sizes = {"n_batch": batch, "n_total": n_total, "width": width, "HISTORY": state.shape[3], "E": block}
    grid = layers * batch, triton.cdiv(width, block)
    launch(kernel, grid, state.device, **_fields(order), **arguments, **sizes, **chosen.options)


def _fields(order: Order | None) -> dict[str, Tensor | None]:
    return dict.fromkeys(Order._fields) if order is None else order._asdict()


def _inputs(x: Tensor, conv_state: Tensor, order: Order | None, weights: Weights, writes: range) -> dict[str, object]:
    """What both directions take."""
    n_total, batch, width = x.shape
    return {
        "x": x,
        "conv_state": conv_state,
        **_fields(order),
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
