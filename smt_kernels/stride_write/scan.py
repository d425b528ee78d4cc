"""The recurrence over gated writes, with the product of dt before it and skip and output gate behind it: forward.

    dt = softplus(W_dt low + bias);   h_k = exp(dt_k a) h_{k-1} + dt_k u_k b_k;   y_k = (c_k . h_k + d u_k) silu(z_k)

A thread has the states of a channel, and walks over the writes: only h depends on the write before, so all that ``T`` writes
load is asked for at once. Where that makes too few threads, ``Q`` share a channel, ``S`` states each: blocks are [Q, S, E]. A
program has one block of E of one row, and at most ``CHUNK`` writes. More than that are three launches:

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
from smt_kernels.stride_write.blocks import channels, load, settings, silu, softplus, store
from smt_kernels.stride_write.kept import CHUNK, Kept
from smt_kernels.stride_write.reference import Weights
from smt_kernels.tiles import LOG2_E, dot

# Rows of the product of dt: the least that a dot takes.
ROWS: tl.constexpr = tl.constexpr(16)


@triton.jit
def wide(i):
    """A number in 64 bits; the interpreter counts loops in numbers of Python."""
    return tl.zeros([], dtype=tl.int64) + i


@triton.jit
def is_on(gate, strides_gate, i_batch, i_step, exists):
    """Whether a write, if it exists, happens."""
    on = exists
    if gate is not None:
        on = tl.load(gate + i_batch * strides_gate[0] + i_step * strides_gate[1], mask=exists, other=0) != 0
    return on


@triton.jit
def writes_of(
    i_first, n_steps, i_batch, n_batch, gate, strides_gate, dt_product, b_bias, u, o_e, m_e, width, T: tl.constexpr
):  # fmt: skip
    """Of T writes, each a tuple of T: whether they happen, the input of the softplus, dt, and u, [E]; 0 where they do not."""
    all_on, inputs, all_dt, all_u = (), (), (), ()
    for t in tl.static_range(T):
        i_step = i_first + t
        on = is_on(gate, strides_gate, i_batch, i_step, i_step < n_steps)
        p_row = (wide(i_step) * n_batch + i_batch) * width + o_e
        b_input = load(dt_product + p_row, m_e & on) + b_bias
        all_on += (on,)
        inputs += (b_input,)
        all_dt += (tl.where(on, softplus(b_input), 0.0),)
        all_u += (load(u + p_row, m_e & on),)
    return all_on, inputs, all_dt, all_u


@triton.jit
def gated_of(x, strides_x, i_first, all_on, i_batch, o_e, m_e, T: tl.constexpr):
    """x (K, B, E) of T writes, a tuple of [E]; 0 where they do not happen."""
    rows = ()
    for t in tl.static_range(T):
        o_row = wide(i_first + t) * strides_x[0] + i_batch * strides_x[1]
        rows += (load(x + o_row + o_e, m_e & all_on[t]),)
    return rows


@triton.jit
def columns_of(p_columns, i_first, n_steps, i_batch, n_batch, m_column, o_column, stride, T: tl.constexpr):
    """Pointers to columns of T rows [T, columns], the first of which is ``p_columns``, and which of them there are."""
    o_step = i_first + tl.arange(0, T)
    o_row = (o_step * n_batch + i_batch).to(tl.int64)
    return p_columns + o_row[:, None] * stride + o_column[None, :], (o_step < n_steps)[:, None] & m_column[None, :]


@triton.jit
def rows_of(p_columns, i_first, n_steps, i_batch, n_batch, m_n, o_n, stride, T: tl.constexpr):
    """N columns of T rows, a tuple of [Q, S]; 0 where there is no row."""
    rows = ()
    for t in tl.static_range(T):
        i_step = i_first + t
        rows += (load(p_columns + (wide(i_step) * n_batch + i_batch) * stride + o_n, m_n & (i_step < n_steps)),)
    return rows


@triton.jit
def states_of(STATE: tl.constexpr, S: tl.constexpr, Q: tl.constexpr):
    """The numbers of states [Q, S], and which of them exist."""
    o_n = tl.arange(0, Q)[:, None] * S + tl.arange(0, S)[None, :]
    return o_n, o_n < STATE


@triton.jit
def matrix_at(states, strides, o_e, o_n):
    """Pointers to a matrix [Q, S, E], in whichever order it lies in memory, of which every thread is to have one channel.

    The compiler deals out what it finds contiguous, in vectors: several channels to a thread, and a few of the states of each.
    Two channels at a time, but aligned for one, makes it one.
    """
    pointers = states + o_e[None, None, :] * strides[0] + o_n[:, :, None] * strides[1]
    return tl.multiple_of(tl.max_contiguous(pointers, [1, 1, 2]), [1, 2, 2])


@triton.jit
def state_at(states, strides, i_chunk, i_batch, o_e, o_n):
    """Pointers to the state [Q, S, E] of a chunk and batch row."""
    return matrix_at(states + i_chunk * strides[0] + i_batch * strides[1], (strides[2], strides[3]), o_e, o_n)


@triton.jit
def over_states(b_x):
    """The sum of [Q, S, E] over states: those of a thread, then those of Q threads."""
    return tl.sum(tl.sum(b_x, axis=1), axis=0)


@triton.jit
def decay(b_dt, b_a):
    """What a write leaves of the state before it [Q, S, E]."""
    return tl.exp2((b_dt * LOG2_E)[None, None, :] * b_a)


@triton.jit
def after(b_h, b_dt, b_u, b_b, b_a):
    """The state [Q, S, E] after a write."""
    return decay(b_dt, b_a) * b_h + (b_dt * b_u)[None, None, :] * b_b[:, :, None]


@triton.jit(do_not_specialize=["n_writes"])
def scan_kernel(
    z, gate, u, dt_proj_weight, dt_proj_bias, a, d, starts, projected, dt_product, y, ends, sums,
    strides_z, strides_gate, strides_a, strides_starts, strides_ends, strides_y, n_batch, n_writes, width,
    RANK: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, PROJECTS: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr, E: tl.constexpr, S: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """One chunk of one batch row and block of E.

    If it ``PROJECTS``, W_dt low is formed and stored, and else loaded. Without ``starts`` the chunk begins with zeros. ``ends``
    and ``sums`` get the state after it and the sum of its dt, ``y`` its outputs.
    """
    i_chunk, i_batch = tl.program_id(0) // n_batch, (tl.program_id(0) % n_batch).to(tl.int64)
    i_place = i_chunk.to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_n, m_n = states_of(STATE, S, Q)
    m_state = m_n[:, :, None] & m_e[None, None, :]
    WIDE: tl.constexpr = RANK + 2 * STATE
    b_bias = load(dt_proj_bias + o_e, m_e)  # [E]
    b_a = load(matrix_at(a, strides_a, o_e, o_n), m_state)  # [Q, S, E]
    b_h = tl.zeros([Q, S, E], dtype=tl.float32)
    if starts is not None:
        b_h = load(state_at(starts, strides_starts, i_place, i_batch, o_e, o_n), m_state)
    b_sum = tl.zeros([E], dtype=tl.float32)
    n_steps = tl.minimum(n_writes, (i_chunk + 1) * CHUNK)
    if PROJECTS:
        o_r = tl.arange(0, R)
        m_r = o_r < RANK
        p_weight = dt_proj_weight + o_e[None, :] * RANK + o_r[:, None]
        b_weight = tl.load(p_weight, mask=m_r[:, None] & m_e[None, :], other=0.0).to(u.dtype.element_ty)  # [R, E]
        for i_first in range(i_chunk * CHUNK, n_steps, ROWS):
            p_low, m_low = columns_of(projected, i_first, n_steps, i_batch, n_batch, m_r, o_r, WIDE, ROWS)
            b_product = dot(load(p_low, m_low).to(b_weight.dtype), b_weight)  # [ROWS, E]
            p_product, m_product = columns_of(dt_product, i_first, n_steps, i_batch, n_batch, m_e, o_e, width, ROWS)
            store(p_product, b_product, m_product)
        tl.debug_barrier()  # a thread reads what another one has written
    for i_first in range(i_chunk * CHUNK, n_steps, T):
        all_on, _, all_dt, all_u = writes_of(
            i_first, n_steps, i_batch, n_batch, gate, strides_gate, dt_product, b_bias, u, o_e, m_e, width, T
        )
        all_b = rows_of(projected + RANK, i_first, n_steps, i_batch, n_batch, m_n, o_n, WIDE, T)
        if y is not None:
            all_c = rows_of(projected + RANK + STATE, i_first, n_steps, i_batch, n_batch, m_n, o_n, WIDE, T)
            b_d = load(d + o_e, m_e)  # [E]
            all_z = gated_of(z, strides_z, i_first, all_on, i_batch, o_e, m_e, T)
        for t in tl.static_range(T):
            # Bit for bit what it was, even the sign of a zero, where nothing is written.
            b_h = tl.where(all_on[t], after(b_h, all_dt[t], all_u[t], all_b[t], b_a), b_h)
            if sums is not None:
                b_sum += all_dt[t]
            if y is not None:
                b_inner = over_states(b_h * all_c[t][:, :, None]) + b_d * all_u[t]  # [E]
                b_y = tl.where(all_on[t], b_inner * silu(all_z[t]), 0.0)
                p_y = y + wide(i_first + t) * strides_y[0] + i_batch * strides_y[1] + o_e
                store(p_y, b_y, m_e & (i_first + t < n_steps))
    if ends is not None:
        store(state_at(ends, strides_ends, i_place, i_batch, o_e, o_n), b_h, m_state)
    if sums is not None:
        store(sums + tl.program_id(0).to(tl.int64) * width + o_e, b_sum, m_e)


@triton.jit(do_not_specialize=["n_chunks"])
def carry_kernel(
    first, ends, sums, a, starts, last, strides_first, strides_ends, strides_a, strides_starts, strides_last,
    n_batch, n_chunks, width,
    STATE: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr, E: tl.constexpr, S: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """From what each chunk makes of zeros, ``ends``, and the sum of its dt: what each begins with, and what the last leaves.

    Backward (``REVERSE``) the last chunk is the first, and states are gradients of states.
    """
    i_batch = tl.program_id(0).to(tl.int64)
    o_e, m_e = channels(tl.program_id(1), width, E)
    o_n, m_n = states_of(STATE, S, Q)
    m_state = m_n[:, :, None] & m_e[None, None, :]
    b_a = load(matrix_at(a, strides_a, o_e, o_n), m_state)  # [Q, S, E]
    b_h = tl.zeros([Q, S, E], dtype=tl.float32)
    if first is not None:
        b_h = load(state_at(first, strides_first, 0, i_batch, o_e, o_n), m_state)
    for i_first in range(0, n_chunks, T):
        all_places, all_sums, all_ends = (), (), ()
        for t in tl.static_range(T):
            i_place = wide(n_chunks - 1 - i_first - t if REVERSE else i_first + t)
            exists = i_first + t < n_chunks
            all_places += (i_place,)
            all_sums += (load(sums + (i_place * n_batch + i_batch) * width + o_e, m_e & exists),)  # [E]
            all_ends += (load(state_at(ends, strides_ends, i_place, i_batch, o_e, o_n), m_state & exists),)  # [Q, S, E]
        for t in tl.static_range(T):
            p_start = state_at(starts, strides_starts, all_places[t], i_batch, o_e, o_n)
            store(p_start, b_h, m_state & (i_first + t < n_chunks))
            b_h = decay(all_sums[t], b_a) * b_h + all_ends[t]
    store(state_at(last, strides_last, 0, i_batch, o_e, o_n), b_h, m_state)


def scan(
    z: Tensor,
    gate: Tensor | None,
    kept: Kept,
    weights: Weights,
    ssm_state: Tensor,
    y: Tensor,
    new_ssm_state: Tensor,
) -> None:
    """From z (K, B, E), and u and W_x u of what is kept, to y (K, B, E) and the state after K.

    Fills what else is kept. ssm_state and new_ssm_state are (B, E, N), with any strides; the gate is (B, K).
    """
    n_chunks = ceil_div(len(z), CHUNK)
    inputs = scan_inputs(z, gate, kept, weights, "scan")
    inputs |= {"u": kept.u, "dt_proj_weight": weights.dt_proj_weight, "d": weights.d}
    inputs["strides_y"] = y.stride()[:2]
    inputs["R"] = padded_size(inputs["RANK"])
    if n_chunks == 1:
        starts, ends = states_named("starts", ssm_state), states_named("ends", new_ssm_state)
        launch_scan(scan_kernel, "scan", 1, **inputs, **starts, **ends, PROJECTS=True, y=y, sums=None)
        return
    starts = kept.starts.mT
    ends, sums = torch.empty_like(starts), starts.new_empty(n_chunks, *y.shape[1:])
    from_zeros = states_named("starts", None) | states_named("ends", ends)
    launch_scan(scan_kernel, "scan", n_chunks, **inputs, **from_zeros, PROJECTS=True, y=None, sums=sums)
    carry(ssm_state, ends, sums, weights.a, starts, new_ssm_state, reverse=False)
    from_starts = states_named("starts", starts) | states_named("ends", None)
    launch_scan(scan_kernel, "scan", n_chunks, **inputs, **from_starts, PROJECTS=False, y=y, sums=None)


def states_named(name: str, states: Tensor | None) -> dict[str, object]:
    """States (chunks, B, E, N), or (B, E, N) of one chunk, as arguments of a kernel, with their strides."""
    strides = () if states is None else states.stride()
    return {name: states, f"strides_{name}": (*[0] * (4 - len(strides)), *strides)}


def carry(first: Tensor | None, ends: Tensor, sums: Tensor, a: Tensor, starts: Tensor, last: Tensor, *, reverse: bool) -> None:
    """From ``first`` (B, E, N) and what chunks make of zeros (chunks, B, E, N) to ``starts`` of each and ``last``."""
    n_chunks, batch, width, n_state = ends.shape
    sizes = scan_sizes("carry", n_chunks, batch, width, n_state, a.device)
    launch(
        carry_kernel,
        (batch, ceil_div(width, sizes["E"])),
        a.device,
        **states_named("first", first),
        **states_named("ends", ends),
        **states_named("starts", starts),
        **states_named("last", last),
        sums=sums,
        a=a,
        strides_a=a.stride(),
        n_batch=batch,
        n_chunks=n_chunks,
        width=width,
        STATE=n_state,
        REVERSE=reverse,
        **sizes,
        **settings("carry", a.device).options,
    )


def scan_inputs(z: Tensor, gate: Tensor | None, kept: Kept, weights: Weights, kernel: str) -> dict[str, object]:
    """What the kernels take that walk over the writes of z (K, B, E), and their sizes."""
    n_writes, batch, width = z.shape
    n_state, rank = weights.a.shape[1], weights.dt_proj_weight.shape[1]
    return {
        "z": z,
        "gate": gate,
        "projected": kept.projected,
        "dt_product": kept.dt_product,
        "dt_proj_bias": weights.dt_proj_bias,
        "a": weights.a,
        "strides_a": weights.a.stride(),
        "strides_z": z.stride()[:2],
        "strides_gate": (0, 0) if gate is None else gate.stride(),
        "n_batch": batch,
        "n_writes": n_writes,
        "width": width,
        "RANK": rank,
        "STATE": n_state,
        "CHUNK": CHUNK,
        **scan_sizes(kernel, n_writes, ceil_div(n_writes, CHUNK) * batch, width, n_state, z.device),
    }


def scan_sizes(kernel: str, n_writes: int, rows: int, width: int, n_state: int, device: torch.device) -> dict[str, int]:
    """How many channels and writes a program of ``kernel`` loads at once, and how many threads share a channel's states."""
    chosen, states = settings(kernel, device), power_of_two(n_state)
    block = scan_block(kernel, rows, width, n_state, device)
    shared = min(max(32 * chosen.num_warps // block, 1), states)
    return {"T": min(chosen.steps, power_of_two(n_writes)), "E": block, "S": states // shared, "Q": shared}


def scan_block(kernel: str, rows: int, width: int, n_state: int, device: torch.device) -> int:
    """How many of the E channels a program of ``kernel`` has; there is one for each block of E and each of ``rows``."""
    chosen, least = settings(kernel, device), ROWS.value  # what a dot takes
    block = max(min(chosen.width(power_of_two(n_state)), 64), least)  # no more than keeps a GPU busy
    while block > least and rows * ceil_div(width, block) < chosen.programs:
        block //= 2
    return block


def launch_scan(kernel: triton.JITFunction, name: str, n_chunks: int, **arguments: object) -> None:
    """Launch ``kernel`` once per chunk, batch row and block of E; ``arguments`` hold ``scan_inputs``."""
    device = arguments["z"].device
    grid = n_chunks * arguments["n_batch"], ceil_div(arguments["width"], arguments["E"])
    launch(kernel, grid, device, **arguments, **settings(name, device).options)
