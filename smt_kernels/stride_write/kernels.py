"""The SSM write in Triton: one launch for a single write; for several, convolution and scan.

    u = silu(conv(x));  (low, b, c) = W_x u;  dt = softplus(W_dt low + bias)
    h_k = exp(dt_k a) h_{k-1} + dt_k b_k u_k;   y_k = (c_k . h_k + d u_k) silu(z_k)

A single write, where launches cost more than arithmetic, is parallel in rows only: no dt is known before W_x has met all of u,
so one program has all of a row, and walks over E twice. Several writes are cut at W_x, and everything is
parallel in rows, in blocks of E and in time:

    forward    convolution with its share of W_x | sums of the shares | scan with W_dt
    backward   scan backward with its share of W_dt | sums of the shares | convolution backward with W_x

The forward pass keeps u and both products for the backward pass. Sums over rows and over blocks of E are left as one partial
sum per program: no atomics. Where the gate is off, u is 0, hence b and c; dt is set to 0; the states pass.
"""
# ruff: noqa: RUF005  (Triton knows the sum of two tuples, not the unpacking of one)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import ceil_div, launch, power_of_two
from smt_kernels.stride_write.blocks import (
    advance,
    by_channel,
    channels,
    convolve,
    load,
    load_columns,
    partial_sums,
    settings,
    shift,
    silu,
    softplus,
    store,
    store_columns,
    strides,
)
from smt_kernels.stride_write.conv_states import conv_states, conv_states_backward
from smt_kernels.stride_write.convolution import conv_blocks, convolution
from smt_kernels.stride_write.convolution_backward import convolution_backward, tap_sums
from smt_kernels.stride_write.fold import fold
from smt_kernels.stride_write.kept import CHUNK, Kept, layout
from smt_kernels.stride_write.order import Order, order_of
from smt_kernels.stride_write.reference import Weights
from smt_kernels.stride_write.scan import scan, scan_block
from smt_kernels.stride_write.scan_backward import ScanGradients, scan_backward
from smt_kernels.tiles import LOG2_E


def forward(
    x: Tensor, z: Tensor, conv_state: Tensor, ssm_state: Tensor, parameters: Weights, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, z (B, K, E), conv_state (B, E, C - 1), ssm_state (B, E, N), gate (B, K) -> y (B, K, E), both states after K, and
    the buffer that ``backward`` takes.
    """
    weights = _packed(parameters, one=x.shape[1] == 1)
    sizes = len(weights.x_proj_weight), weights.a.shape[1]
    buffer, kept = layout("triton", x, conv_state, *sizes).new(x)
    if x.shape[1] == 1:
        return *_single_write(x, z, conv_state, ssm_state, weights, gate, kept), buffer
    y, new_conv_state, new_ssm_state = (model.new_empty(model.shape) for model in (x, conv_state, ssm_state))
    order, inputs = order_of(gate), x.transpose(0, 1)
    write_rows(inputs, conv_state, order, weights, kept.u, kept.projected, range(len(inputs)))
    conv_states(inputs[None], conv_state[None], order, new_conv_state[None])
    scan(z.transpose(0, 1), gate, kept, weights, ssm_state, y.transpose(0, 1), new_ssm_state)
    return y, new_conv_state, new_ssm_state, buffer


def write_rows(
    x: Tensor, conv_state: Tensor, order: Order | None, weights: Weights, u: Tensor, projected: Tensor, writes: range
) -> None:
    """From x (K, B, E), fill u (K, B, E) of ``writes`` and W_x u of them, projected (len(writes), B, R + 2 N).

    Of many rows the library's product moves far less than partial sums would.
    """
    if len(writes) <= CHUNK:
        partials = partial_sums(x, conv_blocks(x), *projected.shape)
        convolution(x, conv_state, order, weights, u, partials, writes)
    else:
        convolution(x, conv_state, order, weights, u, None, writes)
        partials = (u[writes.start : writes.stop].flatten(0, 1) @ weights.x_proj_weight.to(x.dtype).T)[None]
    fold(partials, projected)


def backward(
    grad_y: Tensor,
    grad_conv: Tensor | None,
    grad_ssm: Tensor | None,
    buffer: Tensor,
    x: Tensor,
    z: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    parameters: Weights,
    gate: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of x, z, conv_state, ssm_state and of each of the seven weights, each in the dtype of its input."""
    weights = _packed(parameters)
    (batch, n_writes, width), (wide, n_state) = x.shape, (len(weights.x_proj_weight), weights.a.shape[1])
    kept = layout("triton", x, conv_state, wide, n_state).of(buffer)
    starts = kept.starts.mT if len(kept.starts) else ssm_state[None]
    blocks = ceil_div(width, scan_block("scan_backward", len(starts) * batch, width, n_state, x.device))
    d_x, d_z = (model.new_empty(model.shape) for model in (x, z))
    grads = ScanGradients(
        z=d_z.transpose(0, 1),
        u=torch.empty_like(kept.u),
        dt_product=torch.empty_like(kept.u),
        projected=partial_sums(x, blocks, n_writes, batch, wide),
        ssm_state=ssm_state.new_empty(ssm_state.shape),
        bias=partial_sums(x, len(starts), batch, width),
        a=partial_sums(x, len(starts), batch, n_state, width).mT,
        d=partial_sums(x, len(starts), batch, width),
    )
    order = order_of(gate)
    scan_backward(grad_y.transpose(0, 1), grad_ssm, z.transpose(0, 1), gate, kept, weights, starts, grads, adds=False)
    d_projected = kept.u.new_empty(n_writes, batch, wide)
    d_taps = partial_sums(x, tap_sums(n_writes, batch), width, weights.conv_weight.shape[1] + 1)
    convolution_backward(
        x.transpose(0, 1), conv_state, order, weights, grads.projected, grad_conv, grads.u, d_projected, d_x.transpose(0, 1),
        d_taps, range(n_writes), adds=False,
    )  # fmt: skip
    d_conv = conv_state.new_empty(conv_state.shape)
    conv_states_backward(
        grads.u[None], None if grad_conv is None else grad_conv[None], order, weights.conv_weight[None], d_conv[None]
    )
    d_taps = d_taps.sum(0)
    low = kept.projected[..., : wide - 2 * n_state].to(x.dtype)
    d_x_proj, d_dt_proj = (
        grad.flatten(0, 1).T @ rows.flatten(0, 1) for grad, rows in ((d_projected, kept.u), (grads.dt_product, low))
    )
    d_weights = d_taps[:, :-1], d_taps[:, -1], d_x_proj, d_dt_proj, *(sums.sum((0, 1)) for sums in grads[-3:])
    d_weights = (grad.to(weight.dtype).contiguous() for grad, weight in zip(d_weights, parameters, strict=True))
    return d_x, d_z, d_conv, grads.ssm_state, *d_weights


def _packed(parameters: Weights, *, one: bool = False) -> Weights:
    """As kernels take them: contiguous, but for a where it is not one write."""
    weights = Weights(*(weight.contiguous() for weight in parameters))
    return weights if one else weights._replace(a=by_channel(weights.a))


@triton.jit
def _single_write_kernel(
    x, z, conv_state, ssm_state, gate, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d,
    y, new_conv_state, new_ssm_state, u, dt_product, projected,
    strides_x, strides_z, strides_conv, strides_ssm, strides_gate, width,
    RANK: tl.constexpr, STATE: tl.constexpr, TAPS: tl.constexpr, E: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The one write of a row: first W_x u, then the rest, with u computed again. Where the gate is off, no weight is read.

    u, dt_product and projected are for the backward pass only.
    """
    i_row = tl.program_id(0).to(tl.int64)
    on = True
    if gate is not None:
        on = tl.load(gate + i_row * strides_gate[0]) != 0
    n_blocks = tl.cdiv(width, E)
    o_r, o_n = tl.arange(0, R), tl.arange(0, N)
    m_r, m_n = o_r < RANK, o_n < STATE
    p_x, p_z = x + i_row * strides_x[0], z + i_row * strides_z[0]
    p_conv, p_ssm = conv_state + i_row * strides_conv[0], ssm_state + i_row * strides_ssm[0]

    b_low_products = tl.zeros([R, E], dtype=tl.float32)
    b_b_products = tl.zeros([N, E], dtype=tl.float32)
    b_c_products = tl.zeros([N, E], dtype=tl.float32)
    for i_block in range(tl.where(on, n_blocks, 0)):
        o_e, m_e = channels(i_block, width, E)
        window = load_columns(p_conv + o_e * strides_conv[1], strides_conv[2], m_e, TAPS - 1) + (load(p_x + o_e, m_e),)
        taps = load_columns(conv_weight + o_e * TAPS, 1, m_e, TAPS)
        b_u = silu(convolve(window, taps, load(conv_bias + o_e, m_e), TAPS))[None, :]  # [1, E]
        p_weight = x_proj_weight + o_e[None, :]
        b_low_products += load(p_weight + o_r[:, None] * width, m_r[:, None] & m_e[None, :]) * b_u
        b_b_products += load(p_weight + (RANK + o_n)[:, None] * width, m_n[:, None] & m_e[None, :]) * b_u
        b_c_products += load(p_weight + (RANK + STATE + o_n)[:, None] * width, m_n[:, None] & m_e[None, :]) * b_u
    b_low = tl.sum(b_low_products, axis=1)  # [R]
    b_b = tl.sum(b_b_products, axis=1)  # [N]
    b_c = tl.sum(b_c_products, axis=1)  # [N]
    p_projected = projected + i_row * (RANK + 2 * STATE)
    store(p_projected + o_r, b_low, m_r)
    store(p_projected + RANK + o_n, b_b, m_n)
    store(p_projected + RANK + STATE + o_n, b_c, m_n)

    for i_block in range(n_blocks):
        o_e, m_e = channels(i_block, width, E)
        m_on = m_e & on
        history = load_columns(p_conv + o_e * strides_conv[1], strides_conv[2], m_e, TAPS - 1)
        taps = load_columns(conv_weight + o_e * TAPS, 1, m_on, TAPS)
        window = history + (load(p_x + o_e, m_on),)
        b_u = silu(convolve(window, taps, load(conv_bias + o_e, m_on), TAPS))  # [E]
        b_weight = load(dt_proj_weight + o_e[:, None] * RANK + o_r[None, :], m_on[:, None] & m_r[None, :])  # [E, R]
        b_dt_product = tl.sum(b_weight * b_low[None, :], axis=1)  # [E]
        b_dt = softplus(b_dt_product + load(dt_proj_bias + o_e, m_on))  # [E]
        m_state = m_e[:, None] & m_n[None, :]
        b_rate = load(a + o_e[:, None] * STATE + o_n[None, :], m_state & on) * LOG2_E  # [E, N]
        b_h = load(p_ssm + o_e[:, None] * strides_ssm[1] + o_n[None, :] * strides_ssm[2], m_state)  # [E, N]
        b_h = tl.where(on, advance(b_h, b_dt, b_u, b_b, b_rate), b_h)
        b_inner = tl.sum(b_h * b_c[None, :], axis=1) + load(d + o_e, m_on) * b_u  # [E]
        b_y = tl.where(on, b_inner * silu(load(p_z + o_e, m_on)), 0.0)
        o_out = i_row * width + o_e
        store(y + o_out, b_y, m_e)
        store(u + o_out, b_u, m_e)
        store(dt_product + o_out, b_dt_product, m_e)
        store(new_ssm_state + o_out[:, None] * STATE + o_n[None, :], b_h, m_state)
        store_columns(new_conv_state + o_out * (TAPS - 1), shift(window, on, TAPS), m_e, TAPS - 1)


def _single_write(
    x: Tensor,
    z: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: Weights,
    gate: Tensor | None,
    kept: Kept,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, z (B, 1, E), conv_state (B, E, C - 1), ssm_state (B, E, N), gate (B, 1) -> y (B, 1, E) and both states; fills kept."""
    (batch, _, width), n_state, rank = x.shape, weights.a.shape[1], weights.dt_proj_weight.shape[1]
    padded_state, padded_rank = power_of_two(n_state), power_of_two(rank)
    y, new_conv_state, new_ssm_state = (model.new_empty(model.shape) for model in (x, conv_state, ssm_state))
    chosen = settings("single_write", x.device)
    launch(
        _single_write_kernel,
        (batch,),
        x.device,
        x=x,
        z=z,
        conv_state=conv_state,
        ssm_state=ssm_state,
        gate=gate,
        **weights._asdict(),
        y=y,
        new_conv_state=new_conv_state,
        new_ssm_state=new_ssm_state,
        u=kept.u,
        dt_product=kept.dt_product,
        projected=kept.projected,
        strides_x=x.stride(),
        strides_z=z.stride(),
        strides_conv=conv_state.stride(),
        strides_ssm=ssm_state.stride(),
        strides_gate=strides(gate),
        width=width,
        RANK=rank,
        STATE=n_state,
        TAPS=weights.conv_weight.shape[1],
        E=chosen.width(padded_rank + 2 * padded_state),
        N=padded_state,
        R=padded_rank,
        **chosen.options,
    )
    return y, new_conv_state, new_ssm_state
