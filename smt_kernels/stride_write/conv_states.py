"""The conv states of all layers after their writes, each in one launch, and the gradients of those before."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import ceil_div, launch
from smt_kernels.stride_write.blocks import channels, load, settings, store
from smt_kernels.stride_write.order import Order


@triton.jit(do_not_specialize=["n_total"])
def conv_state_kernel(
    x, conv_state, place, count, new_conv_state, strides_x, strides_conv, n_batch, n_total, width,
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
    d_conv, grad_conv, place, count, conv_weight, d_conv_state, strides_grad_conv, n_batch, n_total, width,
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
    sizes |= {"place": None, "count": None} if order is None else {"place": order.place, "count": order.count}
    grid = layers * batch, ceil_div(width, block)
    launch(kernel, grid, state.device, **arguments, **sizes, **chosen.options)
