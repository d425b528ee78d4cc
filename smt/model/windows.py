"""The windows that ``token`` and ``stride`` encode: cut out of a sequence, and what is kept of the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smt.config import SMTConfig
from smt.state.layout import KeyValues
from smt.state.rings import take


@dataclass(frozen=True, eq=False)
class Span:
    """Consecutive entries: values (B, L, d), and the step (of a token) or index (of a slot) of the first."""

    values: Tensor
    first: int

    @property
    def stop(self) -> int:
        """One past the last index."""
        return self.first + self.values.shape[1]


@dataclass(frozen=True)
class WindowLayout:
    """Which windows encode a run of steps: window i ends at step ends[i] and holds n slots and ``n_tokens`` tokens.

    ``tail`` queries of each window are computed; the first step asked for is query ``skip`` of the first window.
    """

    ends: range
    n_tokens: int
    tail: int
    skip: int


def window_layout(config: SMTConfig, first: int, stop: int) -> WindowLayout:
    if config.encoding == "token":
        return WindowLayout(ends=range(first, stop), n_tokens=config.m_input_tokens, tail=1, skip=0)
    window, stride = config.window, config.stride
    first_block, last_block = window.block_of(first), window.block_of(stop - 1)
    if first_block == last_block:
        # One block, perhaps unfinished: leave out the entries after the last step, which do not exist yet.
        missing = window.block_end(last_block) - (stop - 1)
        return WindowLayout(ends=range(stop - 1, stop), n_tokens=config.m_input_tokens - missing, tail=stop - first, skip=0)
    ends = range(window.block_end(first_block), window.block_end(last_block) + 1, stride)
    return WindowLayout(ends=ends, n_tokens=config.m_input_tokens, tail=stride, skip=first - (ends.start - stride + 1))


def cut_windows(
    config: SMTConfig, layout: WindowLayout, tokens: Span, slots: Span
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The windows (B * len(ends), n + n_tokens, d) and how many slots and tokens of each exist (None: all, everywhere)."""
    batch, n_windows = tokens.values.shape[0], len(layout.ends)
    start, stop = layout.ends.start - layout.n_tokens + 1, layout.ends[-1] + 1
    padded = F.pad(tokens.values, (0, 0, tokens.first - start, stop - tokens.stop))
    token_windows = padded.unfold(1, layout.n_tokens, layout.ends.step).transpose(2, 3)  # (B, N, n_tokens, d)

    window, n_slots = config.window, config.n_ssm_outputs
    first, last = (window.writes_before(end) if config.writes else 0 for end in (layout.ends.start, layout.ends[-1]))
    ends = torch.arange(layout.ends.start, layout.ends.stop, layout.ends.step, device=padded.device)
    written = window.writes_before(ends) if config.writes else torch.zeros_like(ends)
    padded = F.pad(slots.values, (0, 0, n_slots - (first - slots.first), last - slots.stop))
    distinct = padded.unfold(1, n_slots, 1).transpose(2, 3) if n_slots else padded[:, :, None, :0]
    slot_windows = distinct.index_select(1, written - first) if n_slots else token_windows[:, :, :0]

    windows = torch.cat([slot_windows, token_windows], dim=2).flatten(0, 1)
    valid = [
        None if first_held >= full else held.clamp(max=full).to(torch.int32).expand(batch, n_windows).flatten()
        for first_held, held, full in (
            (first - slots.first, written - slots.first, n_slots),
            (layout.ends.start + 1 - tokens.first, ends + 1 - tokens.first, layout.n_tokens),
        )
    ]
    return windows, valid[0], valid[1]


def window_cache(config: SMTConfig, k: Tensor, v: Tensor, steps: Sequence[int]) -> KeyValues:
    """What a layer keeps of the windows in which each row's last step lies.

    Args:
        k, v: (B, n + L, H_kv, D), slots and the first L tokens of the window, L <= m.
        steps: the last step of each row.
    """
    n_slots = config.n_ssm_outputs
    if config.encoding == "token":
        # Copies, since a view would keep the whole window alive.
        return KeyValues(*(part[:, :size].clone() for size in (0, n_slots) for part in (k, v)))
    absent = [absent_in_block(config, step) for step in steps]
    if len(set(absent)) == 1:
        absent = absent[:1]
    shift = torch.tensor(absent, device=k.device)
    halves = []
    for half, start, stop, size in ((0, n_slots, None, config.m_input_tokens), (1, None, n_slots, n_slots)):
        position = torch.arange(size, device=k.device) + shift[:, half, None]
        halves += [take(part[:, start:stop], position) for part in (k, v)]
    return KeyValues(*halves)


def absent_in_block(config: SMTConfig, step: int) -> tuple[int, int]:
    """How many tokens and slots at the start of the window of ``step``'s block lie before the sequence (``stride``)."""
    if config.empty_slots == "zero":
        return 0, 0 if config.writes else config.n_ssm_outputs
    start, _ = config.window.visible_tokens(config.window.block_end(config.window.block_of(step)))
    n_slots = config.window.writes_before(step) if config.writes else 0
    return max(0, -start), max(0, config.n_ssm_outputs - n_slots)
