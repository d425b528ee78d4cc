"""The recurrence over gated writes, backward: gradients through output gate, skip, recurrence and the product of dt.

    dh_k = c_k dinner_k + decay_{k+1} dh_{k+1},   dinner = dy silu(z);   d(dt a)_k = dh_k decay_k h_{k-1}

Both running sums are scans over blocks [T, N, E], as forward: of the states before each write, and, from the back, of their
gradients. A chunk walks forward to the states before each of its blocks, leaves them in memory, and comes back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import padded_size
from smt_kernels.stride_write.blocks import channels, load, silu, silu_gradient, softplus, store
from smt_kernels.stride_write.kept import CHUNK, Kept
from smt_kernels.stride_write.reference import Weights
from smt_kernels.stride_write.scan import (
    ROWS,
    carry,
    first_of,
    is_on,
    last_of,
    launch_scan,
    row_of,
    scan_block,
    scan_inputs,
    states_of,
    then,
)
from smt_kernels.tiles import LOG2_E, dot


@triton.jit
def _dt(dt_product, b_bias, o_row, on, o_e, m_e, width):
    """dt before its softplus, and dt, 0 where the gate is off, [T, E]."""
    b_input = load(dt_product + o_row[:, None] * width + o_e[None, :], on[:, None] & m_e[None, :]) + b_bias[None, :]
    return b_input, tl.where(on[:, None], softplus(b_input), 0.0)


@triton.jit
def gradients_of(b_next_decay, b_grad, b_dh, o_t, T: tl.constexpr):
    """The gradients of the states after each of T writes [T, N, E]; ``b_dh`` comes from behind to the last of them."""
    b_grad += tl.where((o_t == T - 1)[:, None, None], b_dh[None], 0.0)
    _, b_grads = tl.associative_scan((b_next_decay, b_grad), 0, then, reverse=True)
    return b_grads


@triton.jit(do_not_specialize=["n_writes"])
def local_backward_kernel(
    grad_y, z, gate, projected, dt_product, dt_proj_bias, a, ends, sums,
    strides_grad_y, strides_z, strides_gate, n_batch, n_writes, width,
    RANK: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to the gradient of the state before it, and the sum of its dt."""
    i_chunk, i_batch = tl.program_id(0) // n_batch, (tl.program_id(0) % n_batch).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_n, o_t = tl.arange(0, N), tl.arange(0, T)
    m_n = o_n < STATE
    m_state = m_n[:, None] & m_e[None, :]
    b_bias = load(dt_proj_bias + o_e, m_e)  # [E]
    b_rate = load(a + o_e[None, :] * STATE + o_n[:, None], m_state) * LOG2_E  # [N, E]
    b_dh = tl.zeros([N, E], dtype=tl.float32)
    b_sum = tl.zeros([E], dtype=tl.float32)
    n_steps = tl.minimum(n_writes, (i_chunk + 1) * CHUNK)
    n_blocks = tl.cdiv(n_steps - i_chunk * CHUNK, T)
    for i_done in range(n_blocks):
        i_first = i_chunk * CHUNK + (n_blocks - 1 - i_done) * T
        m_step, o_step, o_row = row_of(i_first, n_steps, n_batch, i_batch, T)
        on = is_on(gate, strides_gate, i_batch, o_step, m_step)
        m_next = (o_t < T - 1) & (o_step + 1 < n_steps)
        on_next = is_on(gate, strides_gate, i_batch, o_step + 1, m_next)
        _, b_dt = _dt(dt_product, b_bias, o_row, on, o_e, m_e, width)
        _, b_next_dt = _dt(dt_product, b_bias, o_row + n_batch, on_next, o_e, m_e, width)
        m_on = on[:, None] & m_e[None, :]
        o_k = o_step[:, None].to(tl.int64)
        b_z = load(z + o_k * strides_z[0] + i_batch * strides_z[1] + o_e[None, :], m_on)
        b_dy = load(grad_y + o_k * strides_grad_y[0] + i_batch * strides_grad_y[1] + o_e[None, :], m_on)
        p_c = projected + o_row[:, None] * (RANK + 2 * STATE) + RANK + STATE + o_n[None, :]
        b_c = load(p_c, on[:, None] & m_n[None, :])  # [T, N]
        b_grad = (b_dy * silu(b_z))[:, None, :] * b_c[:, :, None]
        b_grads = gradients_of(tl.exp2(b_next_dt[:, None, :] * b_rate[None]), b_grad, b_dh, o_t, T)
        b_dh = first_of(tl.exp2(b_dt[:, None, :] * b_rate[None]) * b_grads, T)
        b_sum += tl.sum(b_dt, axis=0)
    o_end = tl.program_id(0).to(tl.int64) * width + o_e
    store(ends + o_end[None, :] * STATE + o_n[:, None], b_dh, m_state)
    store(sums + o_end, b_sum, m_e)


@triton.jit(do_not_specialize=["n_writes", "stride_partials"])
def scan_backward_kernel(
    grad_y, grad_ends, z, gate, u, projected, dt_product, dt_proj_weight, dt_proj_bias, a, d, starts, checkpoints,
    d_z, d_u, d_dt_product, partials, d_starts, d_bias, d_a, d_d,
    strides_grad_y, strides_grad_ends, strides_z, strides_gate, strides_starts, strides_d_z, stride_partials,
    n_batch, n_writes, width,
    RANK: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, ADDS: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of one batch row and block of E.

    ``grad_ends`` are those of the states after each chunk, ``d_starts`` of the one before it. d_u is what does not pass through
    W_x; partials (blocks of E, rows, R + 2 N) are partial sums of the gradients of low, b and c; d_bias, d_a and d_d of each
    chunk and batch row are partial sums, added to what is there if ``ADDS``.
    """
    i_chunk, i_batch = tl.program_id(0) // n_batch, (tl.program_id(0) % n_batch).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_n, o_t = tl.arange(0, N), tl.arange(0, T)
    m_n = o_n < STATE
    m_state = m_n[:, None] & m_e[None, :]
    WIDE: tl.constexpr = RANK + 2 * STATE
    o_state = o_e[None, :] * STATE + o_n[:, None]
    b_bias, b_d = load(dt_proj_bias + o_e, m_e), load(d + o_e, m_e)  # [E]
    b_a = load(a + o_state, m_state)  # [N, E]
    b_rate = b_a * LOG2_E
    p_start = starts + i_chunk * strides_starts[0] + i_batch * strides_starts[1]
    b_h = load(p_start + o_e[None, :] * strides_starts[2] + o_n[:, None] * strides_starts[3], m_state)  # [N, E]
    n_steps = tl.minimum(n_writes, (i_chunk + 1) * CHUNK)
    n_blocks = tl.cdiv(n_steps - i_chunk * CHUNK, T)
    p_checkpoint = checkpoints + tl.program_id(0).to(tl.int64) * (CHUNK // T - 1) * width * STATE + o_state
    for i_block in range(n_blocks - 1):
        store(p_checkpoint, b_h, m_state)
        p_checkpoint += width * STATE
        m_step, o_step, o_row = row_of(i_chunk * CHUNK + i_block * T, n_steps, n_batch, i_batch, T)
        on = is_on(gate, strides_gate, i_batch, o_step, m_step)
        _, b_dt = _dt(dt_product, b_bias, o_row, on, o_e, m_e, width)
        b_u = load(u + o_row[:, None] * width + o_e[None, :], on[:, None] & m_e[None, :])
        b_b = load(projected + o_row[:, None] * WIDE + RANK + o_n[None, :], on[:, None] & m_n[None, :])
        b_written = (b_dt * b_u)[:, None, :] * b_b[:, :, None]
        b_h = last_of(states_of(tl.exp2(b_dt[:, None, :] * b_rate[None]), b_written, b_h, o_t, T), T)
    tl.debug_barrier()  # a thread may read what another one has written

    b_dh = tl.zeros([N, E], dtype=tl.float32)
    if grad_ends is not None:
        p_grad = grad_ends + i_chunk * strides_grad_ends[0] + i_batch * strides_grad_ends[1]
        b_dh += load(p_grad + o_e[None, :] * strides_grad_ends[2] + o_n[:, None] * strides_grad_ends[3], m_state)
    b_da = tl.zeros([N, E], dtype=tl.float32)
    b_dd = tl.zeros([E], dtype=tl.float32)
    b_dbias = tl.zeros([E], dtype=tl.float32)
    for i_done in range(n_blocks):
        i_block = n_blocks - 1 - i_done
        if i_done > 0:
            p_checkpoint -= width * STATE
            b_h = load(p_checkpoint, m_state)
        m_step, o_step, o_row = row_of(i_chunk * CHUNK + i_block * T, n_steps, n_batch, i_batch, T)
        on = is_on(gate, strides_gate, i_batch, o_step, m_step)
        m_on, m_row = on[:, None] & m_e[None, :], m_step[:, None] & m_e[None, :]
        # The state before each write: the recurrence over the writes one earlier.
        on_before = is_on(gate, strides_gate, i_batch, o_step - 1, m_step & (o_t > 0))
        m_before = on_before[:, None] & m_e[None, :]
        o_before = o_row - n_batch
        _, b_dt_before = _dt(dt_product, b_bias, o_before, on_before, o_e, m_e, width)
        b_u_before = load(u + o_before[:, None] * width + o_e[None, :], m_before)
        b_b_before = load(projected + o_before[:, None] * WIDE + RANK + o_n[None, :], on_before[:, None] & m_n[None, :])
        b_written = (b_dt_before * b_u_before)[:, None, :] * b_b_before[:, :, None]
        b_before = states_of(tl.exp2(b_dt_before[:, None, :] * b_rate[None]), b_written, b_h, o_t, T)  # [T, N, E]

        b_dt_input, b_dt = _dt(dt_product, b_bias, o_row, on, o_e, m_e, width)
        b_u = load(u + o_row[:, None] * width + o_e[None, :], m_on)
        p_projected = projected + o_row[:, None] * WIDE + RANK + o_n[None, :]
        b_b = load(p_projected, on[:, None] & m_n[None, :])  # [T, N]
        b_c = load(p_projected + STATE, on[:, None] & m_n[None, :])
        o_k = o_step[:, None].to(tl.int64)
        b_z = load(z + o_k * strides_z[0] + i_batch * strides_z[1] + o_e[None, :], m_on)
        b_dy = load(grad_y + o_k * strides_grad_y[0] + i_batch * strides_grad_y[1] + o_e[None, :], m_on)
        b_decay = tl.exp2(b_dt[:, None, :] * b_rate[None])
        b_states = b_decay * b_before + (b_dt * b_u)[:, None, :] * b_b[:, :, None]
        b_inner = tl.sum(b_states * b_c[:, :, None], axis=1) + b_d[None, :] * b_u  # [T, E]
        b_dinner = b_dy * silu(b_z)
        p_dz = d_z + o_k * strides_d_z[0] + i_batch * strides_d_z[1] + o_e[None, :]
        store(p_dz, b_dy * b_inner * silu_gradient(b_z), m_row)
        o_columns = tl.program_id(1).to(tl.int64) * stride_partials + o_row[:, None] * WIDE
        m_columns = m_step[:, None] & m_n[None, :]
        b_dc = tl.sum(b_states * b_dinner[:, None, :], axis=2)  # [T, N]
        store(partials + o_columns + RANK + STATE + o_n[None, :], b_dc, m_columns)

        m_next = (o_t < T - 1) & (o_step + 1 < n_steps)
        on_next = is_on(gate, strides_gate, i_batch, o_step + 1, m_next)
        _, b_next_dt = _dt(dt_product, b_bias, o_row + n_batch, on_next, o_e, m_e, width)
        b_grad = b_dinner[:, None, :] * b_c[:, :, None]
        b_grads = gradients_of(tl.exp2(b_next_dt[:, None, :] * b_rate[None]), b_grad, b_dh, o_t, T)  # [T, N, E]
        b_db = tl.sum(b_grads * (b_dt * b_u)[:, None, :], axis=2)  # [T, N]
        store(partials + o_columns + RANK + o_n[None, :], b_db, m_columns)
        b_dwritten = tl.sum(b_grads * b_b[:, :, None], axis=1)  # [T, E], of dt u
        b_grads *= b_decay
        b_dh = first_of(b_grads, T)
        b_grads *= b_before  # now of dt a
        b_da += tl.sum(b_grads * b_dt[:, None, :], axis=0)
        b_ddt = tl.sum(b_grads * b_a[None], axis=1) + b_dwritten * b_u  # [T, E]
        b_ddt_input = tl.where(on[:, None], b_ddt * tl.sigmoid(b_dt_input), 0.0)
        b_dd += tl.sum(b_dinner * b_u, axis=0)
        b_dbias += tl.sum(b_ddt_input, axis=0)
        o_out = o_row[:, None] * width + o_e[None, :]
        store(d_u + o_out, b_dinner * b_d[None, :] + b_dwritten * b_dt, m_row)
        store(d_dt_product + o_out, b_ddt_input, m_row)
    tl.debug_barrier()
    o_r = tl.arange(0, R)
    m_r = o_r < RANK
    p_weight = dt_proj_weight + o_e[:, None] * RANK + o_r[None, :]
    b_weight = tl.load(p_weight, mask=m_e[:, None] & m_r[None, :], other=0.0).to(d_dt_product.dtype.element_ty)  # [E, R]
    for i_first in range(i_chunk * CHUNK, n_steps, ROWS):
        m_step, _, o_row = row_of(i_first, n_steps, n_batch, i_batch, ROWS)
        p_ddt = d_dt_product + o_row[:, None] * width + o_e[None, :]
        b_ddt = tl.load(p_ddt, mask=m_step[:, None] & m_e[None, :], other=0.0)  # [ROWS, E]
        p_low = partials + tl.program_id(1).to(tl.int64) * stride_partials + o_row[:, None] * WIDE + o_r[None, :]
        store(p_low, dot(b_ddt, b_weight), m_step[:, None] & m_r[None, :])

    o_e += tl.program_id(0).to(tl.int64) * width
    o_state = o_e[None, :] * STATE + o_n[:, None]
    if d_starts is not None:
        store(d_starts + o_state, b_dh, m_state)
    if ADDS:
        b_da += load(d_a + o_state, m_state)
        b_dd += load(d_d + o_e, m_e)
        b_dbias += load(d_bias + o_e, m_e)
    store(d_a + o_state, b_da, m_state)
    store(d_d + o_e, b_dd, m_e)
    store(d_bias + o_e, b_dbias, m_e)


class ScanGradients(NamedTuple):
    """Where the gradients of a scan go. The last three are partial sums of each chunk and batch row, chunks first."""

    z: Tensor  # (K, B, E), any strides
    u: Tensor  # (K, B, E), what does not pass through W_x
    dt_product: Tensor  # (K, B, E)
    projected: Tensor  # (blocks of E, K, B, R + 2 N) in fp32, partial sums
    ssm_state: Tensor  # (B, E, N)
    bias: Tensor  # (chunks, B, E) in fp32
    a: Tensor  # (chunks, B, E, N) in fp32
    d: Tensor  # (chunks, B, E) in fp32


def scan_backward(
    grad_y: Tensor,
    grad_ssm: Tensor | None,
    z: Tensor,
    gate: Tensor | None,
    kept: Kept,
    weights: Weights,
    starts: Tensor,
    grads: ScanGradients,
    *,
    adds: bool,
) -> None:
    """Fill ``grads`` from those of y (K, B, E) and of the state after K; ``starts`` (chunks, B, E, N) are states before chunks.

    With ``adds`` the last three are added to what is there. The gradient of ssm_state may take the memory of ``grad_ssm``.
    """
    n_writes, batch, width = z.shape
    n_chunks = len(starts)
    inputs = scan_inputs(z, gate, kept, weights, "scan_backward")
    inputs |= {"grad_y": grad_y, "strides_grad_y": grad_y.stride()[:2]}
    if n_chunks == 1:
        grad_ends, strides_grad_ends = grad_ssm, (0, 0, 0, 0) if grad_ssm is None else (0, *grad_ssm.stride())
        d_starts = grads.ssm_state
    else:
        ends, sums = (starts.new_empty(starts.shape[:n], dtype=grads.a.dtype) for n in (4, 3))
        grad_ends, d_starts = torch.empty_like(ends), None
        local = inputs | {"E": scan_block("local_backward", n_writes, inputs["STATE"], z.device)}
        launch_scan(local_backward_kernel, "local_backward", n_chunks, **local, ends=ends, sums=sums)
        carry(grad_ssm, ends, sums, weights.a, grad_ends, grads.ssm_state, reverse=True)
        strides_grad_ends = grad_ends.stride()
    checkpoints = starts.new_empty((n_chunks * batch, CHUNK // inputs["T"] - 1, width, inputs["STATE"]), dtype=grads.a.dtype)
    launch_scan(
        scan_backward_kernel,
        "scan_backward",
        n_chunks,
        **inputs,
        u=kept.u,
        dt_proj_weight=weights.dt_proj_weight,
        d=weights.d,
        starts=starts,
        strides_starts=starts.stride(),
        grad_ends=grad_ends,
        strides_grad_ends=strides_grad_ends,
        checkpoints=checkpoints,
        d_z=grads.z,
        strides_d_z=grads.z.stride()[:2],
        d_u=grads.u,
        d_dt_product=grads.dt_product,
        partials=grads.projected,
        stride_partials=grads.projected.stride(0),
        d_starts=d_starts,
        d_bias=grads.bias,
        d_a=grads.a,
        d_d=grads.d,
        R=padded_size(inputs["RANK"]),
        ADDS=adds,
    )
