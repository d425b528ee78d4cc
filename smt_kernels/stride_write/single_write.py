"""A single write in Triton, forward: one launch, as launches cost more than arithmetic then.

It is parallel in rows only: no dt is known before W_x has met all of u, so one program has all of a row, and walks over E
twice. A conv window is a tuple of C blocks [E], oldest first: an entry shifts from name to name, not from thread to thread.
"""
# ruff: noqa: RUF005  (Triton knows the sum of two tuples, not the unpacking of one)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import launch, power_of_two
from smt_kernels.stride_write.blocks import channels, load, settings, silu, softplus, store, strides
from smt_kernels.stride_write.kept import Kept
from smt_kernels.stride_write.reference import Weights
from smt_kernels.tiles import LOG2_E


@triton.jit
def _convolve(window, taps, b_bias, TAPS: tl.constexpr):
    b_conv = b_bias
    for i in tl.static_range(TAPS):
        b_conv += window[i] * taps[i]
    return b_conv


@triton.jit
def _shift(window, on, TAPS: tl.constexpr):
    """What the next window starts with: the newest C - 1 entries, or the same as this one where nothing was written."""
    history = ()
    for i in tl.static_range(TAPS - 1):
        history += (tl.where(on, window[i + 1], window[i]),)
    return history


@triton.jit
def _advance(b_h, b_dt, b_u, b_b, b_rate):
    """decay h + dt u b, with rate = a / ln 2."""
    return tl.exp2(b_dt[:, None] * b_rate) * b_h + (b_dt * b_u)[:, None] * b_b[None, :]  # [E, N]


@triton.jit
def _load_columns(p_rows, stride, mask, COLUMNS: tl.constexpr):
    """The columns of a matrix, one block [E] each."""
    columns = ()
    for i in tl.static_range(COLUMNS):
        columns += (load(p_rows + i * stride, mask),)
    return columns


@triton.jit
def _store_columns(p_rows, columns, mask, COLUMNS: tl.constexpr):
    for i in tl.static_range(COLUMNS):
        store(p_rows + i, columns[i], mask)


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
        window = _load_columns(p_conv + o_e * strides_conv[1], strides_conv[2], m_e, TAPS - 1) + (load(p_x + o_e, m_e),)
        taps = _load_columns(conv_weight + o_e * TAPS, 1, m_e, TAPS)
        b_u = silu(_convolve(window, taps, load(conv_bias + o_e, m_e), TAPS))[None, :]  # [1, E]
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
        history = _load_columns(p_conv + o_e * strides_conv[1], strides_conv[2], m_e, TAPS - 1)
        taps = _load_columns(conv_weight + o_e * TAPS, 1, m_on, TAPS)
        window = history + (load(p_x + o_e, m_on),)
        b_u = silu(_convolve(window, taps, load(conv_bias + o_e, m_on), TAPS))  # [E]
        b_weight = load(dt_proj_weight + o_e[:, None] * RANK + o_r[None, :], m_on[:, None] & m_r[None, :])  # [E, R]
        b_dt_product = tl.sum(b_weight * b_low[None, :], axis=1)  # [E]
        b_dt = softplus(b_dt_product + load(dt_proj_bias + o_e, m_on))  # [E]
        m_state = m_e[:, None] & m_n[None, :]
        b_rate = load(a + o_e[:, None] * STATE + o_n[None, :], m_state & on) * LOG2_E  # [E, N]
        b_h = load(p_ssm + o_e[:, None] * strides_ssm[1] + o_n[None, :] * strides_ssm[2], m_state)  # [E, N]
        b_h = tl.where(on, _advance(b_h, b_dt, b_u, b_b, b_rate), b_h)
        b_inner = tl.sum(b_h * b_c[None, :], axis=1) + load(d + o_e, m_on) * b_u  # [E]
        b_y = tl.where(on, b_inner * silu(load(p_z + o_e, m_on)), 0.0)
        o_out = i_row * width + o_e
        store(y + o_out, b_y, m_e)
        store(u + o_out, b_u, m_e)
        store(dt_product + o_out, b_dt_product, m_e)
        store(new_ssm_state + o_out[:, None] * STATE + o_n[None, :], b_h, m_state)
        _store_columns(new_conv_state + o_out * (TAPS - 1), _shift(window, on, TAPS), m_e, TAPS - 1)


def single_write(
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
