"""The recurrence over K gated writes with its skip and output gate, forward and backward.

    h_k = exp(dt_k a) h_{k-1} + dt_k u_k b_k;   y_k = (c_k . h_k + d u_k) silu(z_k)
    dh_k = exp(dt_{k+1} a) dh_{k+1} + c_k dy_k silu(z_k)

The backward pass computes the states again: it writes one to memory every ``STEPS`` writes (none up to ``STEPS`` writes) and
holds those of one segment of ``STEPS`` writes in registers. ``STEPS`` is 1 for a single write and else ``SEGMENT``, beyond the
last write without effect: shorter segments for the few writes between would be kernels more, and those spill registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.stride_write.blocks import (
    advance,
    channels,
    is_on,
    launch_over_channels,
    load,
    partial_sums,
    settings,
    silu,
    silu_gradient,
    softplus,
    store,
    strides,
)
from smt_kernels.stride_write.kept import Kept
from smt_kernels.stride_write.reference import Weights
from smt_kernels.tiles import LOG2_E

# Most writes whose states the backward pass holds in registers.
SEGMENT = 8


@triton.jit
def _load_write(u, dt_product, projected, b_bias, on, o_write, o_e, m_e, o_n, m_n, width, rank, STATE: tl.constexpr):
    """u, dt before its softplus, dt, b and c of write ``o_write``, counted over all rows; all but the second 0 if it is off."""
    b_u = load(u + o_write * width + o_e, m_e & on)  # [E]
    b_dt_input = load(dt_product + o_write * width + o_e, m_e & on) + b_bias  # [E]
    b_dt = tl.where(on, softplus(b_dt_input), 0.0)  # [E]
    p_b = projected + o_write * (rank + 2 * STATE) + rank + o_n
    return b_u, b_dt_input, b_dt, load(p_b, m_n & on), load(p_b + STATE, m_n & on)


@triton.jit(do_not_specialize=["n_writes"])
def _scan_kernel(
    z, ssm_state, gate, u, projected, dt_product, dt_proj_bias, a, d, y, new_ssm_state,
    strides_z, strides_ssm, strides_gate, n_writes, width, rank,
    STATE: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The recurrence over the K writes of one row and block of E, with skip and output gate."""
    i_row = tl.program_id(0).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_n = tl.arange(0, N)
    m_n = o_n < STATE
    m_state = m_e[:, None] & m_n[None, :]
    b_bias, b_d = load(dt_proj_bias + o_e, m_e), load(d + o_e, m_e)  # [E]
    b_rate = load(a + o_e[:, None] * STATE + o_n[None, :], m_state) * LOG2_E  # [E, N]
    p_ssm = ssm_state + i_row * strides_ssm[0] + o_e[:, None] * strides_ssm[1] + o_n[None, :] * strides_ssm[2]
    b_h = load(p_ssm, m_state)  # [E, N]
    p_z = z + i_row * strides_z[0] + o_e
    for i_write in range(n_writes):
        on = is_on(gate, strides_gate, i_row, i_write, True)
        o_write = i_row * n_writes + i_write
        b_u, _, b_dt, b_b, b_c = _load_write(
            u, dt_product, projected, b_bias, on, o_write, o_e, m_e, o_n, m_n, width, rank, STATE
        )
        b_h = tl.where(on, advance(b_h, b_dt, b_u, b_b, b_rate), b_h)
        b_inner = tl.sum(b_h * b_c[None, :], axis=1) + b_d * b_u  # [E]
        store(y + o_write * width + o_e, tl.where(on, b_inner * silu(load(p_z, m_e & on)), 0.0), m_e)
        p_z += strides_z[1]
    store(new_ssm_state + (i_row * width + o_e)[:, None] * STATE + o_n[None, :], b_h, m_state)


@triton.jit(do_not_specialize=["n_writes", "n_segments"])
def _scan_backward_kernel(
    grad_y, grad_ssm, z, ssm_state, gate, u, projected, dt_product, dt_proj_bias, a, d, checkpoints,
    d_z, d_u, d_dt_product, d_bc, d_ssm, d_bias, d_a, d_d,
    strides_grad_y, strides_grad_ssm, strides_z, strides_ssm, strides_gate, n_writes, n_segments, width, rank,
    STATE: tl.constexpr, E: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients through output gate, skip and recurrence of one row and block of E, in segments of ``STEPS`` writes.

    d_u is what does not pass through W_x; d_bc (blocks of E, B, K, 2 N), d_bias, d_d (B, E) and d_a (B, E, N) are partial sums.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_n = tl.arange(0, N)
    m_n = o_n < STATE
    m_state = m_e[:, None] & m_n[None, :]
    o_state = o_e[:, None] * STATE + o_n[None, :]
    b_bias, b_d = load(dt_proj_bias + o_e, m_e), load(d + o_e, m_e)  # [E]
    b_a = load(a + o_state, m_state)  # [E, N]
    b_rate = b_a * LOG2_E
    p_ssm = ssm_state + i_row * strides_ssm[0] + o_e[:, None] * strides_ssm[1] + o_n[None, :] * strides_ssm[2]
    b_h = load(p_ssm, m_state)  # [E, N]
    p_checkpoint = checkpoints + i_row * (n_segments - 1) * width * STATE + o_state
    for i_segment in range(n_segments - 1):
        store(p_checkpoint, b_h, m_state)
        p_checkpoint += width * STATE
        for i_write in range(i_segment * STEPS, (i_segment + 1) * STEPS):
            on = is_on(gate, strides_gate, i_row, i_write, True)
            b_u, _, b_dt, b_b, _ = _load_write(
                u, dt_product, projected, b_bias, on, i_row * n_writes + i_write, o_e, m_e, o_n, m_n, width, rank, STATE
            )
            b_h = advance(b_h, b_dt, b_u, b_b, b_rate)
    tl.debug_barrier()  # a thread may read what another one has written

    b_dh = tl.zeros([E, N], dtype=tl.float32)
    if grad_ssm is not None:
        p_grad = grad_ssm + i_row * strides_grad_ssm[0] + o_e[:, None] * strides_grad_ssm[1]
        b_dh += load(p_grad + o_n[None, :] * strides_grad_ssm[2], m_state)
    b_da = tl.zeros([E, N], dtype=tl.float32)
    b_dd = tl.zeros([E], dtype=tl.float32)
    b_dbias = tl.zeros([E], dtype=tl.float32)
    for i_done in range(n_segments):
        first_write = (n_segments - 1 - i_done) * STEPS
        if i_done > 0:
            p_checkpoint -= width * STATE
            b_h = load(p_checkpoint, m_state)
        states = (b_h,)  # before the segment and after each of its writes
        for i_step in tl.static_range(STEPS):
            i_write = first_write + i_step
            on = is_on(gate, strides_gate, i_row, i_write, i_write < n_writes)
            b_u, _, b_dt, b_b, _ = _load_write(
                u, dt_product, projected, b_bias, on, i_row * n_writes + i_write, o_e, m_e, o_n, m_n, width, rank, STATE
            )
            states += (advance(states[i_step], b_dt, b_u, b_b, b_rate),)

        for i_step in tl.static_range(STEPS - 1, -1, -1):
            i_write = first_write + i_step
            o_write = i_row * n_writes + i_write
            exists = i_write < n_writes
            on = is_on(gate, strides_gate, i_row, i_write, exists)
            m_write, m_on = m_e & exists, m_e & on
            b_u, b_dt_input, b_dt, b_b, b_c = _load_write(
                u, dt_product, projected, b_bias, on, o_write, o_e, m_e, o_n, m_n, width, rank, STATE
            )
            b_z = load(z + i_row * strides_z[0] + i_write * strides_z[1] + o_e, m_on)  # [E]
            b_dy = load(grad_y + i_row * strides_grad_y[0] + i_write * strides_grad_y[1] + o_e, m_on)  # [E]
            b_inner = tl.sum(states[i_step + 1] * b_c[None, :], axis=1) + b_d * b_u  # [E]
            b_dinner = b_dy * silu(b_z)  # [E]
            b_dh += b_dinner[:, None] * b_c[None, :]
            b_dwritten = tl.sum(b_dh * b_b[None, :], axis=1)  # [E], of dt u
            b_db = tl.sum(b_dh * (b_dt * b_u)[:, None], axis=0)  # [N]
            b_dc = tl.sum(states[i_step + 1] * b_dinner[:, None], axis=0)  # [N]
            b_dh *= tl.exp2(b_dt[:, None] * b_rate)
            b_drate = b_dh * states[i_step]  # [E, N], of dt a
            b_da += b_drate * b_dt[:, None]
            b_ddt = tl.sum(b_drate * b_a, axis=1) + b_dwritten * b_u  # [E]
            b_ddt_input = tl.where(on, b_ddt * tl.sigmoid(b_dt_input), 0.0)  # [E]
            b_dd += b_dinner * b_u
            b_dbias += b_ddt_input
            o_out = o_write * width + o_e
            store(d_z + o_out, b_dy * b_inner * silu_gradient(b_z), m_write)
            store(d_u + o_out, b_dinner * b_d + b_dwritten * b_dt, m_write)
            store(d_dt_product + o_out, b_ddt_input, m_write)
            o_partial = (tl.program_id(1) * tl.num_programs(0) + i_row) * n_writes + i_write
            p_bc = d_bc + o_partial * 2 * STATE + o_n
            store(p_bc, b_db, m_n & exists)
            store(p_bc + STATE, b_dc, m_n & exists)

    o_e += i_row * width
    o_state += i_row * width * STATE
    store(d_ssm + o_state, b_dh, m_state)
    store(d_a + o_state, b_da, m_state)
    store(d_d + o_e, b_dd, m_e)
    store(d_bias + o_e, b_dbias, m_e)


def scan(
    z: Tensor,
    ssm_state: Tensor,
    kept: Kept,
    weights: Weights,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """z (B, K, E), ssm_state (B, E, N) -> y (B, K, E) and the state after K."""
    y, new_ssm_state = z.new_empty(z.shape), ssm_state.new_empty(ssm_state.shape)
    inputs = _inputs(z, ssm_state, kept, weights, gate)
    launch_over_channels("scan", _scan_kernel, z, **inputs, y=y, new_ssm_state=new_ssm_state)
    return y, new_ssm_state


def scan_backward(
    grad_y: Tensor,
    grad_ssm: Tensor | None,
    z: Tensor,
    ssm_state: Tensor,
    kept: Kept,
    weights: Weights,
    gate: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of z, ssm_state, u, dt_product, of b and c as one (B, K, 2 N), and of dt_proj_bias, a and d."""
    (batch, n_writes, width), n_state = z.shape, weights.a.shape[1]
    inputs = _inputs(z, ssm_state, kept, weights, gate)
    steps = 1 if n_writes == 1 else SEGMENT
    n_segments = triton.cdiv(n_writes, steps)
    blocks = triton.cdiv(width, settings("scan_backward", z.device).width(inputs["N"]))
    d_z, d_u, d_dt = (z.new_empty(z.shape) for _ in range(3))
    d_ssm = ssm_state.new_empty(ssm_state.shape)
    d_bc = partial_sums(z, blocks, batch, n_writes, 2 * n_state)
    d_bias, d_a, d_d = (partial_sums(z, batch, *weight.shape) for weight in weights[-3:])
    launch_over_channels(
        "scan_backward",
        _scan_backward_kernel,
        z,
        **inputs,
        grad_y=grad_y,
        grad_ssm=grad_ssm,
        checkpoints=partial_sums(z, batch, n_segments - 1, width, n_state),
        d_z=d_z,
        d_u=d_u,
        d_dt_product=d_dt,
        d_bc=d_bc,
        d_ssm=d_ssm,
        d_bias=d_bias,
        d_a=d_a,
        d_d=d_d,
        strides_grad_y=grad_y.stride(),
        strides_grad_ssm=strides(grad_ssm),
        n_segments=n_segments,
        STEPS=steps,
    )
    return d_z, d_ssm, d_u, d_dt, d_bc.sum(0), d_bias.sum(0), d_a.sum(0), d_d.sum(0)


def _inputs(
    z: Tensor,
    ssm_state: Tensor,
    kept: Kept,
    weights: Weights,
    gate: Tensor | None,
) -> dict[str, object]:
    """What both kernels take."""
    n_state = weights.a.shape[1]
    return {
        "z": z,
        "ssm_state": ssm_state,
        "gate": gate,
        **kept._asdict(),
        "dt_proj_bias": weights.dt_proj_bias,
        "a": weights.a,
        "d": weights.d,
        "strides_z": z.stride(),
        "strides_ssm": ssm_state.stride(),
        "strides_gate": strides(gate),
        "rank": kept.projected.shape[-1] - 2 * n_state,
        "STATE": n_state,
        "N": triton.next_power_of_2(n_state),
    }
