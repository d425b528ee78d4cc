"""Which window sees which tokens and slots: numbers made on the host, and what Triton programs count from them.

Up to P consecutive windows of a row are a *strip*. The entries that they share lie side by side, tokens in one tensor and slots
in another, and are taken E at a time from one of the two. Nothing is copied: a token is read where it lies, by index.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from smt_kernels.attention_pool.reference import Inputs, Timeline
from smt_kernels.window import WindowSpec


class Strips(NamedTuple):
    """``n_rows`` rows of ``n_windows`` windows each, every one of ``n_memory`` slots and ``n_tokens`` tokens.

    Window p of a row begins with token ``token_start + stride * p`` and slot ``slot_start + (p + phase) // group * group``. Of
    these, the tokens 0 to ``held_tokens`` and the slots 0 to ``held_slots`` exist.
    """

    n_rows: int
    n_windows: int
    n_tokens: int
    n_memory: int
    held_tokens: int
    held_slots: int
    token_start: int
    stride: int
    slot_start: int
    phase: int
    group: int


def strips_of(inputs: Inputs, window: WindowSpec, timeline: Timeline) -> Strips:
    """Tokens (B, T, d) and slots (B, K, d) are B rows of the windows of all writes; no slots are one group that pools none."""
    tokens, slots, *_ = inputs
    first_write, n_writes, group, first_step, first_slot = timeline
    n_memory = held_slots = slot_start = phase = 0
    if slots is None:
        group = n_writes
    else:
        n_memory, held_slots, phase = window.n_memory, slots.shape[1], first_write % group
        slot_start = window.pooled_slots(first_write, group)[0] - first_slot
    return Strips(
        n_rows=len(tokens),
        n_windows=n_writes,
        n_tokens=window.n_tokens,
        n_memory=n_memory,
        held_tokens=tokens.shape[1],
        held_slots=held_slots,
        token_start=window.visible_tokens(window.write_step(first_write))[0] - first_step,
        stride=window.stride,
        slot_start=slot_start,
        phase=phase,
        group=group,
    )


@triton.jit
def rows(pointer, strides, i_row, o_index):
    """Pointers to the first element of entries of a row, in 64 bits; ``strides`` are those of row and entry."""
    return pointer + i_row * strides[0] + o_index.to(tl.int64) * strides[1]


@triton.jit
def rows_of(is_slot, slots, tokens, strides_slots, strides_tokens, i_row, o_index):
    """``rows`` of slots or of tokens."""
    # Numbers are chosen, not blocks of pointers, on which the compiler of triton 3.6 fails for AMD.
    pointer = tl.where(is_slot, slots, tokens)
    strides = tl.where(is_slot, strides_slots[0], strides_tokens[0]), tl.where(is_slot, strides_slots[1], strides_tokens[1])
    return rows(pointer, strides, i_row, o_index)


@triton.jit
def strip(n_windows, windows_of_strip, strides_place, P: tl.constexpr):
    """The row of this program, its range [first, stop) of windows in the row, and of P of them which it has and their place."""
    n_strips = tl.cdiv(n_windows, windows_of_strip)
    i_row = (tl.program_id(0) // n_strips).to(tl.int64)
    first = tl.program_id(0) % n_strips * windows_of_strip
    stop = tl.minimum(first + windows_of_strip, n_windows)
    o_window = first + tl.arange(0, P)
    return i_row, first, stop, o_window, o_window < stop, place_of(i_row, o_window, strides_place)


@triton.jit
def place_of(i_row, o_window, strides_place):
    """Where what is stored per window lies, counted in windows: rows one after the other, or windows of all rows."""
    return i_row * strides_place[0] + o_window * strides_place[1]


@triton.jit
def starts(o_window, token_start, stride, slot_start, phase, group):
    """The first token and the first slot of each window."""
    return token_start + stride * o_window, slot_start + (o_window + phase) // group * group


@triton.jit
def shared_blocks(first, stop, n_tokens, n_memory, token_start, stride, slot_start, phase, group, E: tl.constexpr):
    """What the windows [first, stop) of a strip share: first, number, period of slots, of tokens; blocks of slots, of all.

    Numbers, not blocks of them: what is read next must not wait until threads have agreed on a least or a largest.
    """
    o_token, o_slot = starts(first, token_start, stride, slot_start, phase, group)
    o_last_token, o_last_slot = starts(stop - 1, token_start, stride, slot_start, phase, group)
    n_slots, n_shared = o_last_slot - o_slot + n_memory, o_last_token - o_token + n_tokens
    slot_blocks = tl.cdiv(n_slots, E)
    return (o_slot, n_slots, group), (o_token, n_shared, stride), slot_blocks, slot_blocks + tl.cdiv(n_shared, E)


@triton.jit
def shared_entries(i_block, slot_blocks, shared_slots, shared_tokens, i_row, source, held, E: tl.constexpr):
    """Block ``i_block`` of the entries of a strip, slots first: are these slots, their index, which are seen, pointers."""
    tokens, slots, strides_tokens, strides_slots = source
    n_tokens, n_memory, held_tokens, held_slots, exists, o_exists = held
    is_slot = i_block < slot_blocks
    i_first = tl.where(is_slot, shared_slots[0], shared_tokens[0])
    n_shared = tl.where(is_slot, shared_slots[1], shared_tokens[1])
    period = tl.where(is_slot, shared_slots[2], shared_tokens[2])
    n_entries = tl.where(is_slot, n_memory, n_tokens)
    o_shared = tl.where(is_slot, i_block, i_block - slot_blocks) * E + tl.arange(0, E)
    o_index = i_first + o_shared
    # That of the last window which begins no later: windows that are shorter than their period leave gaps.
    o_start = tl.minimum(o_shared // period * period, n_shared - n_entries)
    m_x = (o_shared - o_start < n_entries) & (o_index >= 0) & (o_index < tl.where(is_slot, held_slots, held_tokens))
    if exists is not None:  # of a window that is a row
        m_x = m_x & (tl.load(exists + o_exists + o_shared, mask=m_x, other=0) != 0)
    return is_slot, o_index, m_x, rows_of(is_slot, slots, tokens, strides_slots, strides_tokens, i_row, o_index)


@triton.jit
def seen(is_slot, o_index, o_token, o_slot, m_window, held):
    """Position of entries in windows, which windows have such a position, and which of them see an entry there.

    ``o_index`` against ``o_token``, ``o_slot`` and ``m_window`` in the shapes [1, E] and [P, 1], or [E, 1] and [1, P].
    """
    n_tokens, n_memory, held_tokens, held_slots, exists, o_exists = held
    o_position = o_index - tl.where(is_slot, o_slot, o_token)
    m_inside = (o_position >= 0) & (o_position < tl.where(is_slot, n_memory, n_tokens)) & m_window
    m_seen = m_inside & (o_index >= 0) & (o_index < tl.where(is_slot, held_slots, held_tokens))
    o_position += tl.where(is_slot, 0, n_memory)
    if exists is not None:
        m_seen = m_seen & (tl.load(exists + o_exists + o_position, mask=m_seen, other=0) != 0)
    return o_position, m_inside, m_seen


@triton.jit
def windows_that_see(i_first, i_last, is_slot, n_windows, n_tokens, n_memory, token_start, stride, slot_start, phase, group):
    """The range [start, stop) of windows that see any of the entries ``i_first`` to ``i_last``."""
    # Only numbers that are not negative are divided, since languages differ in how they round the others.
    if is_slot:
        start = tl.cdiv(tl.maximum(i_first - n_memory + 1 - slot_start, 0), group) * group - phase
        stop = (tl.maximum(i_last - slot_start, -group) + group) // group * group - phase
    else:
        start = tl.cdiv(tl.maximum(i_first - n_tokens + 1 - token_start, 0), stride)
        stop = (tl.maximum(i_last - token_start, -stride) + stride) // stride
    return tl.maximum(start, 0), tl.minimum(stop, n_windows)
