"""The recurrence over gated writes, backward: gradients through output gate, skip, recurrence and the product of dt.

    dh_k = c_k dinner_k + decay_{k+1} dh_{k+1},   dinner = dy silu(z);   d(dt a)_k = dh_k decay_k h_{k-1}

A program walks over its chunk forward, leaving the state before every ``T`` writes in memory, and comes back: over T writes at
a time, whose states it forms again and holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import padded_size
from smt_kernels.stride_write.blocks import channels, load, silu, silu_gradient, store
from smt_kernels.stride_write.kept import CHUNK, Kept
from smt_kernels.stride_write.reference import Weights
from smt_kernels.stride_write.scan import (
    ROWS,
    after,
    carry,
    columns_of,
    decay,
    gated_of,
    launch_scan,
    matrix_at,
    over_states,
    rows_of,
    scan_inputs,
    scan_sizes,
    state_at,
    states_named,
    states_of,
    wide,
    writes_of,
)
from smt_kernels.tiles import dot


@triton.jit(do_not_specialize=["n_writes"])
def local_backward_kernel(
    grad_y, z, gate, u, projected, dt_product, dt_proj_bias, a, ends, sums,
    strides_grad_y, strides_z, strides_gate, strides_a, strides_ends, n_batch, n_writes, width,
    RANK: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr,
    E: tl.constexpr, S: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to the gradient of the state before it, and the sum of its dt."""
    i_chunk, i_batch = tl.program_id(0) // n_batch, (tl.program_id(0) % n_batch).to(tl.int64)
    i_place = i_chunk.to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_n, m_n = states_of(STATE, S, Q)
    m_state = m_n[:, :, None] & m_e[None, None, :]
    WIDE: tl.constexpr = RANK + 2 * STATE
    b_bias = load(dt_proj_bias + o_e, m_e)  # [E]
    b_a = load(matrix_at(a, strides_a, o_e, o_n), m_state)  # [Q, S, E]
    b_dh = tl.zeros([Q, S, E], dtype=tl.float32)
    b_sum = tl.zeros([E], dtype=tl.float32)
    n_steps = tl.minimum(n_writes, (i_chunk + 1) * CHUNK)
    n_blocks = tl.cdiv(n_steps - i_chunk * CHUNK, T)
    for i_done in range(n_blocks):
        i_first = i_chunk * CHUNK + (n_blocks - 1 - i_done) * T
        all_on, _, all_dt, _ = writes_of(
            i_first, n_steps, i_batch, n_batch, gate, strides_gate, dt_product, b_bias, u, o_e, m_e, width, T
        )
        all_z = gated_of(z, strides_z, i_first, all_on, i_batch, o_e, m_e, T)
        all_dy = gated_of(grad_y, strides_grad_y, i_first, all_on, i_batch, o_e, m_e, T)
        all_c = rows_of(projected + RANK + STATE, i_first, n_steps, i_batch, n_batch, m_n, o_n, WIDE, T)
        for t in tl.static_range(T - 1, -1, -1):
            b_dinner = all_dy[t] * silu(all_z[t])  # [E], 0 where nothing is written
            b_dh += all_c[t][:, :, None] * b_dinner[None, None, :]
            b_dh *= decay(all_dt[t], b_a)
            b_sum += all_dt[t]
    store(state_at(ends, strides_ends, i_place, i_batch, o_e, o_n), b_dh, m_state)
    store(sums + tl.program_id(0).to(tl.int64) * width + o_e, b_sum, m_e)


@triton.jit(do_not_specialize=["n_writes"])
def scan_backward_kernel(
    grad_y, grad_ends, z, gate, u, projected, dt_product, dt_proj_weight, dt_proj_bias, a, d, starts, checkpoints,
    d_z, d_u, d_dt_product, partials, d_starts, d_bias, d_a, d_d,
    strides_grad_y, strides_grad_ends, strides_z, strides_gate, strides_a, strides_starts, strides_d_z, strides_d_starts,
    strides_d_a, n_batch, n_writes, width,
    RANK: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, ADDS: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr, E: tl.constexpr, S: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of one batch row and block of E.

    ``grad_ends`` are those of the states after each chunk, ``d_starts`` of the one before it. d_u is what does not pass through
    W_x; partials (blocks of E, rows, R + 2 N) are partial sums of the gradients of low, b and c; d_bias, d_a and d_d of each
    chunk and batch row are partial sums, added to what is there if ``ADDS``.
    """
    i_chunk, i_batch = tl.program_id(0) // n_batch, (tl.program_id(0) % n_batch).to(tl.int64)
    i_place = i_chunk.to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_n, m_n = states_of(STATE, S, Q)
    m_state = m_n[:, :, None] & m_e[None, None, :]
    WIDE: tl.constexpr = RANK + 2 * STATE
    b_bias, b_d = load(dt_proj_bias + o_e, m_e), load(d + o_e, m_e)  # [E]
    b_a = load(matrix_at(a, strides_a, o_e, o_n), m_state)  # [Q, S, E]
    b_h = load(state_at(starts, strides_starts, i_place, i_batch, o_e, o_n), m_state)  # [Q, S, E]
    b_dh = tl.zeros([Q, S, E], dtype=tl.float32)
    if grad_ends is not None:
        b_dh += load(state_at(grad_ends, strides_grad_ends, i_place, i_batch, o_e, o_n), m_state)
    b_da = tl.zeros([Q, S, E], dtype=tl.float32)
    b_dd = tl.zeros([E], dtype=tl.float32)
    b_dbias = tl.zeros([E], dtype=tl.float32)
    o_sums = tl.program_id(0).to(tl.int64) * width + o_e
    if ADDS:
        b_da += load(state_at(d_a, strides_d_a, i_place, i_batch, o_e, o_n), m_state)
        b_dd += load(d_d + o_sums, m_e)
        b_dbias += load(d_bias + o_sums, m_e)
    p_partials = partials + tl.program_id(1).to(tl.int64) * n_writes * n_batch * WIDE
    n_steps = tl.minimum(n_writes, (i_chunk + 1) * CHUNK)
    n_blocks = tl.cdiv(n_steps - i_chunk * CHUNK, T)
    p_checkpoint = checkpoints + tl.program_id(0).to(tl.int64) * (CHUNK // T - 1) * width * STATE
    for i_block in range(n_blocks - 1):
        store(matrix_at(p_checkpoint, (1, width), o_e, o_n), b_h, m_state)
        p_checkpoint += width * STATE
        i_first = i_chunk * CHUNK + i_block * T
        all_on, _, all_dt, all_u = writes_of(
            i_first, n_steps, i_batch, n_batch, gate, strides_gate, dt_product, b_bias, u, o_e, m_e, width, T
        )
        all_b = rows_of(projected + RANK, i_first, n_steps, i_batch, n_batch, m_n, o_n, WIDE, T)
        for t in tl.static_range(T):
            b_h = after(b_h, all_dt[t], all_u[t], all_b[t], b_a)
    tl.debug_barrier()  # a thread may read what another one has written

    for i_done in range(n_blocks):
        i_block = n_blocks - 1 - i_done
        if i_done > 0:
            p_checkpoint -= width * STATE
            b_h = load(matrix_at(p_checkpoint, (1, width), o_e, o_n), m_state)
        i_first = i_chunk * CHUNK + i_block * T
        all_on, inputs, all_dt, all_u = writes_of(
            i_first, n_steps, i_batch, n_batch, gate, strides_gate, dt_product, b_bias, u, o_e, m_e, width, T
        )
        all_z = gated_of(z, strides_z, i_first, all_on, i_batch, o_e, m_e, T)
        all_dy = gated_of(grad_y, strides_grad_y, i_first, all_on, i_batch, o_e, m_e, T)
        all_b = rows_of(projected + RANK, i_first, n_steps, i_batch, n_batch, m_n, o_n, WIDE, T)
        states = (b_h,)  # before each write, and after the last
        for t in tl.static_range(T):
            states += (after(states[t], all_dt[t], all_u[t], all_b[t], b_a),)
        for t in tl.static_range(T - 1, -1, -1):
            on, b_dt, b_u, b_z, b_dy, b_b = all_on[t], all_dt[t], all_u[t], all_z[t], all_dy[t], all_b[t]
            m_row = m_e & (i_first + t < n_steps)
            i_step = wide(i_first + t)
            i_row = i_step * n_batch + i_batch
            m_columns = m_n & (i_first + t < n_steps)
            b_c = load(projected + i_row * WIDE + RANK + STATE + o_n, m_columns)  # [Q, S]
            b_inner = over_states(states[t + 1] * b_c[:, :, None]) + b_d * b_u  # [E]
            b_dinner = b_dy * silu(b_z)
            p_dz = d_z + i_step * strides_d_z[0] + i_batch * strides_d_z[1] + o_e
            store(p_dz, b_dy * b_inner * silu_gradient(b_z), m_row)
            p_columns = p_partials + i_row * WIDE + RANK + o_n
            store(p_columns + STATE, tl.sum(states[t + 1] * b_dinner[None, None, :], axis=2), m_columns)
            b_dh += b_c[:, :, None] * b_dinner[None, None, :]  # now of the state after the write, from all that follows
            store(p_columns, tl.sum(b_dh * (b_dt * b_u)[None, None, :], axis=2), m_columns)
            b_dwritten = over_states(b_dh * b_b[:, :, None])  # [E], of dt u
            b_dh *= decay(b_dt, b_a)  # of the state before it
            b_ddecay = b_dh * states[t]  # of dt a
            b_da += b_ddecay * b_dt[None, None, :]
            b_ddt = over_states(b_ddecay * b_a) + b_dwritten * b_u  # [E]
            b_dinput = tl.where(on, b_ddt * tl.sigmoid(inputs[t]), 0.0)
            b_dd += b_dinner * b_u
            b_dbias += b_dinput
            store(d_u + i_row * width + o_e, b_dinner * b_d + b_dwritten * b_dt, m_row)
            store(d_dt_product + i_row * width + o_e, b_dinput, m_row)
    tl.debug_barrier()
    o_r = tl.arange(0, R)
    m_r = o_r < RANK
    p_weight = dt_proj_weight + o_e[:, None] * RANK + o_r[None, :]
    b_weight = tl.load(p_weight, mask=m_e[:, None] & m_r[None, :], other=0.0).to(d_dt_product.dtype.element_ty)  # [E, R]
    for i_first in range(i_chunk * CHUNK, n_steps, ROWS):
        p_ddt, m_ddt = columns_of(d_dt_product, i_first, n_steps, i_batch, n_batch, m_e, o_e, width, ROWS)
        b_ddt = tl.load(p_ddt, mask=m_ddt, other=0.0)  # [ROWS, E]
        p_low, m_low = columns_of(p_partials, i_first, n_steps, i_batch, n_batch, m_r, o_r, WIDE, ROWS)
        store(p_low, dot(b_ddt, b_weight), m_low)

    if d_starts is not None:
        store(state_at(d_starts, strides_d_starts, i_place, i_batch, o_e, o_n), b_dh, m_state)
    store(state_at(d_a, strides_d_a, i_place, i_batch, o_e, o_n), b_da, m_state)
    store(d_d + o_sums, b_dd, m_e)
    store(d_bias + o_sums, b_dbias, m_e)


class ScanGradients(NamedTuple):
    """Where the gradients of a scan go. The last three are partial sums of each chunk and batch row, chunks first."""

    z: Tensor  # (K, B, E), any strides
    u: Tensor  # (K, B, E), what does not pass through W_x
    dt_product: Tensor  # (K, B, E)
    projected: Tensor  # (blocks of E, K, B, R + 2 N) in fp32, contiguous partial sums
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
    inputs |= {"u": kept.u, "grad_y": grad_y, "strides_grad_y": grad_y.stride()[:2]}
    if n_chunks == 1:
        grad_ends, d_starts = grad_ssm, grads.ssm_state
    else:
        ends, sums = torch.empty_like(starts), grads.a.new_empty(starts.shape[:3])
        grad_ends, d_starts = torch.empty_like(starts), None
        local = inputs | scan_sizes("local_backward", n_writes, n_chunks * batch, width, inputs["STATE"], z.device)
        launch_scan(local_backward_kernel, "local_backward", n_chunks, **local, **states_named("ends", ends), sums=sums)
        carry(grad_ssm, ends, sums, weights.a, grad_ends, grads.ssm_state, reverse=True)
    checkpoints = starts.new_empty((n_chunks * batch, CHUNK // inputs["T"] - 1, inputs["STATE"], width), dtype=grads.a.dtype)
    launch_scan(
        scan_backward_kernel,
        "scan_backward",
        n_chunks,
        **inputs,
        dt_proj_weight=weights.dt_proj_weight,
        d=weights.d,
        **states_named("starts", starts),
        **states_named("grad_ends", grad_ends),
        **states_named("d_starts", d_starts),
        **states_named("d_a", grads.a),
        checkpoints=checkpoints,
        d_z=grads.z,
        strides_d_z=grads.z.stride()[:2],
        d_u=grads.u,
        d_dt_product=grads.dt_product,
        partials=grads.projected,
        d_bias=grads.bias,
        d_d=grads.d,
        R=padded_size(inputs["RANK"]),
        ADDS=adds,
    )
