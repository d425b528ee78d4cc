"""The recurrence over gated writes, with the product of dt before it and skip and output gate behind it: forward.

    dt = softplus(W_dt low + bias);   h_k = exp(dt_k a) h_{k-1} + dt_k u_k b_k;   y_k = (c_k . h_k + d u_k) silu(z_k)

Parallel in time: h is the second part of a running product, (p, h) then (q, g) = (p q, q h + g), which needs no order. So a
program takes ``STEPS`` writes at once as blocks [T, N, E], of which each thread holds all T, and a chunk of at most ``CHUNK``
writes in a short loop. More writes than that are three launches:

    every chunk from a state of zero: its last state, and the sum of its dt, since the product of its decays is exp(a sum dt)
    the state before each chunk, from those two: ``carry``
    every chunk from its true state

Rows are counted with time first, k B + b, so that the rows of any run of writes lie together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import ceil_div, launch, padded_size, power_of_two
from smt_kernels.stride_write.blocks import channels, load, settings, silu, softplus, store, strides
from smt_kernels.stride_write.kept import CHUNK, Kept
from smt_kernels.stride_write.reference import Weights
from smt_kernels.tiles import LOG2_E, dot

# Writes that a program takes at once.
STEPS = 8
# Rows of the product of dt: the least that a dot takes.
ROWS: tl.constexpr = tl.constexpr(16)


@triton.jit
def then(decay, h, next_decay, next_h):
    """Two stretches of the recurrence one after the other."""
    return decay * next_decay, next_decay * h + next_h


@triton.jit
def row_of(i_first, n_steps, n_batch, i_batch, T: tl.constexpr):
    """Which of T writes from ``i_first`` on there are, their numbers and their rows."""
    o_step = i_first + tl.arange(0, T)
    return o_step < n_steps, o_step, (o_step * n_batch + i_batch).to(tl.int64)


@triton.jit
def is_on(gate, strides_gate, i_batch, o_step, m_step):
    """Which of the writes that exist happen."""
    on = m_step
    if gate is not None:
        on = tl.load(gate + i_batch * strides_gate[0] + o_step * strides_gate[1], mask=m_step, other=0) != 0
    return on


@triton.jit
def summed(pointers, stride, mask, PARTIALS: tl.constexpr):
    """The sum of ``PARTIALS`` partial sums, each in a block like ``pointers``."""
    b_sum = load(pointers, mask)
    for _ in tl.static_range(1, PARTIALS):
        pointers += stride
        b_sum += load(pointers, mask)
    return b_sum


@triton.jit
def first_of(b_x, T: tl.constexpr):
    """The first of T blocks [T, N, E]."""
    return tl.sum(tl.where((tl.arange(0, T) == 0)[:, None, None], b_x, 0.0), axis=0)


@triton.jit
def last_of(b_x, T: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, T) == T - 1)[:, None, None], b_x, 0.0), axis=0)


@triton.jit
def states_of(b_decay, b_written, b_h, o_t, T: tl.constexpr):
    """The states after each of T writes [T, N, E], from the one before them [N, E]."""
    b_written += tl.where((o_t == 0)[:, None, None], b_decay * b_h[None], 0.0)
    _, b_states = tl.associative_scan((b_decay, b_written), 0, then)
    return b_states


@triton.jit(do_not_specialize=["n_writes", "stride_partials"])
def scan_kernel(
    z, gate, u, partials, dt_proj_weight, dt_proj_bias, a, d, starts, projected, dt_product, y, ends, sums,
    strides_z, strides_gate, strides_starts, strides_y, stride_partials, n_batch, n_writes, width,
    RANK: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, PARTIALS: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One chunk of one batch row and block of E.

    From ``partials`` the products of low, b, c and dt are formed and stored; without them they are loaded. Without ``starts``
    the chunk begins with zeros; ``ends`` and ``sums`` get the state after it and the sum of its dt, ``y`` its outputs.
    """
    i_chunk, i_batch = tl.program_id(0) // n_batch, (tl.program_id(0) % n_batch).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_n, o_t = tl.arange(0, N), tl.arange(0, T)
    m_n = o_n < STATE
    m_state = m_n[:, None] & m_e[None, :]
    WIDE: tl.constexpr = RANK + 2 * STATE
    b_bias = load(dt_proj_bias + o_e, m_e)  # [E]
    b_rate = load(a + o_e[None, :] * STATE + o_n[:, None], m_state) * LOG2_E  # [N, E]
    b_first = tl.zeros([N, E], dtype=tl.float32)
    if starts is not None:
        p_start = starts + i_chunk * strides_starts[0] + i_batch * strides_starts[1]
        b_first = load(p_start + o_e[None, :] * strides_starts[2] + o_n[:, None] * strides_starts[3], m_state)
    b_h = b_first
    b_sum = tl.zeros([E], dtype=tl.float32)
    any_on = False
    n_steps = tl.minimum(n_writes, (i_chunk + 1) * CHUNK)
    if partials is not None:
        o_r = tl.arange(0, R)
        m_r = o_r < RANK
        p_weight = dt_proj_weight + o_e[None, :] * RANK + o_r[:, None]
        b_weight = tl.load(p_weight, mask=m_r[:, None] & m_e[None, :], other=0.0).to(u.dtype.element_ty)  # [R, E]
        for i_first in range(i_chunk * CHUNK, n_steps, ROWS):
            m_step, _, o_row = row_of(i_first, n_steps, n_batch, i_batch, ROWS)
            o_low = o_row[:, None] * WIDE + o_r[None, :]
            m_low = m_step[:, None] & m_r[None, :]
            b_low = summed(partials + o_low, stride_partials, m_low, PARTIALS)  # [ROWS, R]
            b_product = dot(b_low.to(b_weight.dtype), b_weight)  # [ROWS, E]
            store(dt_product + o_row[:, None] * width + o_e[None, :], b_product, m_step[:, None] & m_e[None, :])
            if tl.program_id(1) == 0:
                store(projected + o_low, b_low, m_low)
        tl.debug_barrier()  # a thread reads what another one has written
    for i_first in range(i_chunk * CHUNK, n_steps, T):
        m_step, o_step, o_row = row_of(i_first, n_steps, n_batch, i_batch, T)
        on = is_on(gate, strides_gate, i_batch, o_step, m_step)
        any_on = any_on | (tl.max(on.to(tl.int32), axis=0) > 0)
        m_row = m_step[:, None] & m_e[None, :]
        m_columns = m_step[:, None] & m_n[None, :]
        p_row = o_row[:, None] * width + o_e[None, :]
        o_b = o_row[:, None] * WIDE + RANK + o_n[None, :]
        if partials is not None:
            b_b = summed(partials + o_b, stride_partials, m_columns, PARTIALS)  # [T, N]
            b_c = summed(partials + o_b + STATE, stride_partials, m_columns, PARTIALS)
            if tl.program_id(1) == 0:
                store(projected + o_b, b_b, m_columns)
                store(projected + o_b + STATE, b_c, m_columns)
        else:
            b_b = load(projected + o_b, m_columns)
            b_c = load(projected + o_b + STATE, m_columns)
        b_product = load(dt_product + p_row, m_row)  # [T, E]
        b_dt = tl.where(on[:, None], softplus(b_product + b_bias[None, :]), 0.0)  # [T, E]
        b_u = load(u + p_row, m_row)
        b_decay = tl.exp2(b_dt[:, None, :] * b_rate[None])  # [T, N, E]
        b_states = states_of(b_decay, (b_dt * b_u)[:, None, :] * b_b[:, :, None], b_h, o_t, T)
        b_h = last_of(b_states, T)
        if sums is not None:
            b_sum += tl.sum(b_dt, axis=0)
        if y is not None:
            b_inner = tl.sum(b_states * b_c[:, :, None], axis=1) + load(d + o_e, m_e)[None, :] * b_u  # [T, E]
            p_z = z + o_step[:, None].to(tl.int64) * strides_z[0] + i_batch * strides_z[1] + o_e[None, :]
            b_y = tl.where(on[:, None], b_inner * silu(load(p_z, m_row & on[:, None])), 0.0)
            store(y + o_step[:, None].to(tl.int64) * strides_y[0] + i_batch * strides_y[1] + o_e[None, :], b_y, m_row)
    o_end = tl.program_id(0).to(tl.int64) * width + o_e
    if ends is not None:
        # Bit for bit, even the sign of a zero, where nothing is written.
        store(ends + o_end[None, :] * STATE + o_n[:, None], tl.where(any_on, b_h, b_first), m_state)
    if sums is not None:
        store(sums + o_end, b_sum, m_e)


@triton.jit(do_not_specialize=["n_chunks"])
def carry_kernel(
    first, ends, sums, a, starts, last, strides_first, n_batch, n_chunks, width,
    STATE: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """From what each chunk makes of zeros, ``ends``, and the sum of its dt: what each begins with, and what the last leaves.

    Backward (``REVERSE``) the last chunk is the first, and states are gradients of states.
    """
    i_batch = tl.program_id(0).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_n, o_t = tl.arange(0, N), tl.arange(0, T)
    m_n = o_n < STATE
    m_state = m_n[:, None] & m_e[None, :]
    o_state = o_e[None, :] * STATE + o_n[:, None]
    b_rate = load(a + o_state, m_state) * LOG2_E  # [N, E]
    b_h = tl.zeros([N, E], dtype=tl.float32)
    if first is not None:
        p_first = first + i_batch * strides_first[0] + o_e[None, :] * strides_first[1] + o_n[:, None] * strides_first[2]
        b_h = load(p_first, m_state)
    i_start = n_chunks - 1 if REVERSE else 0
    store(starts + (i_start * n_batch + i_batch) * width * STATE + o_state, b_h, m_state)
    for i_first in range(0, n_chunks, T):
        o_done = i_first + o_t
        o_chunk = n_chunks - 1 - o_done if REVERSE else o_done
        o_place = (o_chunk * n_batch + i_batch) * width
        m_chunk = o_done < n_chunks
        b_dt = load(sums + o_place[:, None] + o_e[None, :], m_chunk[:, None] & m_e[None, :])  # [T, E]
        m_ends = m_chunk[:, None, None] & m_state[None]
        b_ends = load(ends + o_place[:, None, None] * STATE + o_state[None], m_ends)  # [T, N, E]
        b_states = states_of(tl.exp2(b_dt[:, None, :] * b_rate[None]), b_ends, b_h, o_t, T)
        b_h = last_of(b_states, T)
        o_next = o_place + (-n_batch if REVERSE else n_batch) * width
        m_next = (o_done + 1 < n_chunks)[:, None, None] & m_state[None]
        store(starts + o_next[:, None, None] * STATE + o_state[None], b_states, m_next)
    store(last + i_batch * width * STATE + o_state, b_h, m_state)


def scan(
    z: Tensor,
    gate: Tensor | None,
    kept: Kept,
    partials: Tensor,
    weights: Weights,
    ssm_state: Tensor,
    y: Tensor,
    new_ssm_state: Tensor,
) -> None:
    """From z (K, B, E), u and the partial sums of W_x u (any number, K, B, R + 2 N) to y (K, B, E) and the state after K.

    Fills what else is kept. ssm_state and new_ssm_state are (B, E, N), the second contiguous; the gate is (B, K).
    """
    n_chunks = ceil_div(len(z), CHUNK)
    inputs = scan_inputs(z, gate, kept, weights, "scan")
    inputs |= {"u": kept.u, "dt_proj_weight": weights.dt_proj_weight, "d": weights.d}
    inputs |= {"strides_y": y.stride()[:2], "stride_partials": partials.stride(0)}
    products = {"partials": partials, "PARTIALS": len(partials)}
    inputs["R"] = padded_size(inputs["RANK"])
    if n_chunks == 1:
        starts = {"starts": ssm_state, "strides_starts": (0, *ssm_state.stride())}
        launch_scan(scan_kernel, "scan", 1, **inputs, **products, **starts, y=y, ends=new_ssm_state, sums=None)
        return
    ends, sums = torch.empty_like(kept.starts), kept.starts.new_empty(kept.starts.shape[:3])
    nothing = {"starts": None, "strides_starts": (0, 0, 0, 0), "y": None}
    launch_scan(scan_kernel, "scan", n_chunks, **inputs, **products, **nothing, ends=ends, sums=sums)
    carry(ssm_state, ends, sums, weights.a, kept.starts, new_ssm_state, reverse=False)
    starts = {"starts": kept.starts, "strides_starts": kept.starts.stride()}
    launch_scan(scan_kernel, "scan", n_chunks, **inputs, **starts, partials=None, PARTIALS=1, y=y, ends=None, sums=None)


def carry(first: Tensor | None, ends: Tensor, sums: Tensor, a: Tensor, starts: Tensor, last: Tensor, *, reverse: bool) -> None:
    """From ``first`` (B, E, N) and what chunks make of zeros (chunks, B, E, N) to ``starts`` of each and ``last``."""
    n_chunks, batch, width, n_state = ends.shape
    chosen, states, steps = (
        settings("carry", a.device),
        power_of_two(n_state),
        min(STEPS, power_of_two(n_chunks)),
    )
    block = chosen.width(steps * states)
    launch(
        carry_kernel,
        (batch, ceil_div(width, block)),
        a.device,
        first=first,
        ends=ends,
        sums=sums,
        a=a,
        starts=starts,
        last=last,
        strides_first=strides(first),
        n_batch=batch,
        n_chunks=n_chunks,
        width=width,
        STATE=n_state,
        REVERSE=reverse,
        T=steps,
        E=block,
        N=states,
        **chosen.options,
    )


def scan_inputs(z: Tensor, gate: Tensor | None, kept: Kept, weights: Weights, kernel: str) -> dict[str, object]:
    """What the kernels take that walk over the writes of z (K, B, E), and their sizes."""
    n_writes, batch, width = z.shape
    n_state, rank = weights.a.shape[1], weights.dt_proj_weight.shape[1]
    states, steps = power_of_two(n_state), scan_steps(n_writes)
    return {
        "z": z,
        "gate": gate,
        "projected": kept.projected,
        "dt_product": kept.dt_product,
        "dt_proj_bias": weights.dt_proj_bias,
        "a": weights.a,
        "strides_z": z.stride()[:2],
        "strides_gate": (0, 0) if gate is None else gate.stride(),
        "n_batch": batch,
        "n_writes": n_writes,
        "width": width,
        "RANK": rank,
        "STATE": n_state,
        "CHUNK": CHUNK,
        "T": steps,
        "E": scan_block(kernel, n_writes, n_state, z.device),
        "N": states,
    }


def scan_steps(n_writes: int) -> int:
    """How many of them a program takes at once."""
    return min(STEPS, power_of_two(n_writes))


def scan_block(kernel: str, n_writes: int, n_state: int, device: torch.device) -> int:
    """How many of the E channels a program of ``kernel`` has."""
    block = settings(kernel, device).width(scan_steps(n_writes) * power_of_two(n_state))
    return max(min(block, 64), 16)  # at least what a dot takes, and no more than keeps a GPU busy


def launch_scan(kernel: triton.JITFunction, name: str, n_chunks: int, **arguments: object) -> None:
    """Launch ``kernel`` once per chunk, batch row and block of E; ``arguments`` hold ``scan_inputs``."""
    device = arguments["z"].device
    grid = n_chunks * arguments["n_batch"], ceil_div(arguments["width"], arguments["E"])
    launch(kernel, grid, device, **arguments, **settings(name, device).options)
