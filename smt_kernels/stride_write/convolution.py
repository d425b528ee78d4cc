"""The causal depthwise convolution and its SiLU over K gated writes, forward and backward.

u_k = silu(sum_i w_i window_i + bias),  the window being the last C inputs of writes that happened, the conv state before them
"""
# ruff: noqa: RUF005  (Triton knows the sum of two tuples, not the unpacking of one)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.stride_write.blocks import (
    channels,
    convolve,
    is_on,
    launch_over_channels,
    load,
    load_columns,
    partial_sums,
    shift,
    silu,
    silu_gradient,
    store,
    store_columns,
    strides,
)
from smt_kernels.stride_write.reference import Weights


@triton.jit(do_not_specialize=["n_writes"])
def _convolution_kernel(
    x, conv_state, gate, conv_weight, conv_bias, u, new_conv_state, strides_x, strides_conv, strides_gate, n_writes, width,
    TAPS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """u = silu(conv(x)), 0 where the gate is off, and the last C - 1 inputs."""
    i_row = tl.program_id(0).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    taps = load_columns(conv_weight + o_e * TAPS, 1, m_e, TAPS)
    b_bias = load(conv_bias + o_e, m_e)  # [E]
    p_conv = conv_state + i_row * strides_conv[0] + o_e * strides_conv[1]
    history = load_columns(p_conv, strides_conv[2], m_e, TAPS - 1)
    p_x = x + i_row * strides_x[0] + o_e
    p_u = u + i_row * n_writes * width + o_e
    for i_write in range(n_writes):
        on = is_on(gate, strides_gate, i_row, i_write, True)
        window = history + (load(p_x, m_e & on),)
        store(p_u, tl.where(on, silu(convolve(window, taps, b_bias, TAPS)), 0.0), m_e)
        history = shift(window, on, TAPS)
        p_x += strides_x[1]
        p_u += width
    store_columns(new_conv_state + (i_row * width + o_e) * (TAPS - 1), history, m_e, TAPS - 1)


@triton.jit
def _store_input(d_x, d_conv, source, b_value, i_row, o_e, m_e, n_writes, width, TAPS: tl.constexpr):
    """The gradient of the conv input that came as write ``source``, or, where negative, from the end of the conv state."""
    store(d_x + (i_row * n_writes + source) * width + o_e, b_value, m_e & (source >= 0))
    store(d_conv + (i_row * width + o_e) * (TAPS - 1) + TAPS - 1 + source, b_value, m_e & (source < 0))


@triton.jit(do_not_specialize=["n_writes"])
def _convolution_backward_kernel(
    x, conv_state, gate, conv_weight, conv_bias, d_u, d_u_projected, grad_conv, d_x, d_conv, d_weight, d_bias,
    strides_x, strides_conv, strides_gate, strides_grad_conv, n_writes, width,
    TAPS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Gradients through SiLU and convolution of one row and block of E, where u gets the sum of d_u and d_u_projected.

    That of an input grows while the input is in the window and is stored when it leaves. d_weight (B, E, C) and d_bias (B, E)
    are partial sums.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    taps = load_columns(conv_weight + o_e * TAPS, 1, m_e, TAPS)
    b_bias = load(conv_bias + o_e, m_e)  # [E]
    p_conv = conv_state + i_row * strides_conv[0] + o_e * strides_conv[1]
    history = load_columns(p_conv, strides_conv[2], m_e, TAPS - 1)
    b_zero = tl.zeros([E], dtype=tl.float32)
    d_history, d_taps, sources = (), (b_zero,), ()
    for i in tl.static_range(TAPS - 1):
        d_history += (b_zero,)
        d_taps += (b_zero,)
        sources += (tl.full([], i - TAPS + 1, tl.int64),)
    b_dbias = b_zero
    for i_write in range(n_writes):
        on = is_on(gate, strides_gate, i_row, i_write, True)
        m_on = m_e & on
        window = history + (load(x + i_row * strides_x[0] + i_write * strides_x[1] + o_e, m_on),)
        o_u = (i_row * n_writes + i_write) * width + o_e
        b_du = load(d_u + o_u, m_on) + load(d_u_projected + o_u, m_on)  # [E]
        b_dconv = b_du * silu_gradient(convolve(window, taps, b_bias, TAPS))  # [E]
        b_dbias += b_dconv
        grown, d_window, window_sources = (), d_history + (b_zero,), sources + (i_write,)
        sums = ()
        for i in tl.static_range(TAPS):
            grown += (d_window[i] + b_dconv * taps[i],)
            sums += (d_taps[i] + b_dconv * window[i],)
        # Where nothing is written, the input whose gradient is complete is that of this write, and it is 0.
        leaving = tl.where(on, window_sources[0], i_write)
        _store_input(d_x, d_conv, leaving, tl.where(on, grown[0], 0.0), i_row, o_e, m_e, n_writes, width, TAPS)
        history, d_history, sources = shift(window, on, TAPS), shift(grown, on, TAPS), shift(window_sources, on, TAPS)
        d_taps = sums
    if grad_conv is not None:
        p_grad = grad_conv + i_row * strides_grad_conv[0] + o_e * strides_grad_conv[1]
        d_state = load_columns(p_grad, strides_grad_conv[2], m_e, TAPS - 1)
    for i in tl.static_range(TAPS - 1):
        b_value = d_history[i]
        if grad_conv is not None:
            b_value += d_state[i]
        _store_input(d_x, d_conv, sources[i], b_value, i_row, o_e, m_e, n_writes, width, TAPS)
    store_columns(d_weight + (i_row * width + o_e) * TAPS, d_taps, m_e, TAPS)
    store(d_bias + i_row * width + o_e, b_dbias, m_e)


def convolution(x: Tensor, conv_state: Tensor, weights: Weights, gate: Tensor | None, u: Tensor) -> Tensor:
    """x (B, K, E), conv_state (B, E, C - 1) -> the conv state after K; fills u (B, K, E)."""
    new_conv_state = conv_state.new_empty(conv_state.shape)
    launch_over_channels(
        "convolution",
        _convolution_kernel,
        x,
        **_inputs(x, conv_state, weights, gate),
        u=u,
        new_conv_state=new_conv_state,
    )
    return new_conv_state


def convolution_backward(
    d_u: Tensor,
    d_u_projected: Tensor,
    grad_conv: Tensor | None,
    x: Tensor,
    conv_state: Tensor,
    weights: Weights,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From both parts of du (B, K, E) and that of the new state: gradients of x, conv_state, conv_weight and conv_bias."""
    d_x, d_conv = x.new_empty(x.shape), conv_state.new_empty(conv_state.shape)
    d_weight, d_bias = (partial_sums(x, len(x), *weight.shape) for weight in weights[:2])
    launch_over_channels(
        "convolution_backward",
        _convolution_backward_kernel,
        x,
        **_inputs(x, conv_state, weights, gate),
        d_u=d_u,
        d_u_projected=d_u_projected,
        grad_conv=grad_conv,
        d_x=d_x,
        d_conv=d_conv,
        d_weight=d_weight,
        d_bias=d_bias,
        strides_grad_conv=strides(grad_conv),
    )
    return d_x, d_conv, d_weight.sum(0), d_bias.sum(0)


def _inputs(x: Tensor, conv_state: Tensor, weights: Weights, gate: Tensor | None) -> dict[str, object]:
    """What both kernels take."""
    return {
        "x": x,
        "conv_state": conv_state,
        "gate": gate,
        "conv_weight": weights.conv_weight,
        "conv_bias": weights.conv_bias,
        "strides_x": x.stride(),
        "strides_conv": conv_state.stride(),
        "strides_gate": strides(gate),
        "TAPS": weights.conv_weight.shape[1],
    }
