"""The windows that ``token`` and ``stride`` encode: cut out of a sequence, and what is kept of the last of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smt.config import SMTConfig
from smt.state.layout import at_most, existing
from smt.state.rings import take
from smt_kernels.window import Index, WindowSpec


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
    # How many slots were written before each block; -1 before step 0, a block alone, which sees none, as the next one.
    first, last = (window.block_of(end) - 1 if config.writes else 0 for end in (layout.ends.start, layout.ends[-1]))
    ends = torch.arange(layout.ends.start, layout.ends.stop, layout.ends.step, device=padded.device)
    written = window.writes_before(ends) if config.writes else torch.zeros_like(ends)
    slot_windows = token_windows[:, :, :0]
    if n_slots:
        padded = F.pad(slots.values, (0, 0, n_slots - (first - slots.first), 0))[:, : last - first + n_slots]
        slot_windows = padded.unfold(1, n_slots, 1).transpose(2, 3)
        if not config.writes:  # all windows have the same slots
            slot_windows = slot_windows.expand(-1, n_windows, -1, -1)
        elif layout.ends.step < window.stride:  # and here those of a block have
            slot_windows = over_blocks(slot_windows, window, layout.ends.start, layout.ends.stop)

    windows = torch.cat([slot_windows, token_windows], dim=2).flatten(0, 1)
    valid = [
        None if first_held >= full else held.clamp(max=full).to(torch.int32).expand(batch, n_windows).flatten()
        for first_held, held, full in (
            (first - slots.first, written - slots.first, n_slots),
            (layout.ends.start + 1 - tokens.first, ends + 1 - tokens.first, layout.n_tokens),
        )
    ]
    return windows, valid[0], valid[1]


def over_blocks(values: Tensor, window: WindowSpec, first: int, stop: int) -> Tensor:
    """What each step from ``first`` to ``stop`` has of values (B, N, ...), one for each of their blocks: (B, T, ...)."""
    first_block = window.block_of(first)
    skip = first - (window.block_end(first_block) - window.stride + 1)
    every_step = values[:, :, None].expand(-1, -1, window.stride, *values.shape[2:]).flatten(1, 2)
    return every_step[:, skip : skip + stop - first]


def window_cache(config: SMTConfig, keys_and_values: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """What the layers keep of the windows in which each row's last step lies: that of tokens, and that of slots.

    Args:
        keys_and_values: (layers, 2, B, n + L, H_kv, D), of slots and the first L tokens of the window, L <= m.
        steps: (B,) int64, the last step of each row, or (1,) for all rows alike.
    """
    of_slots, of_tokens = keys_and_values.tensor_split([config.n_ssm_outputs], dim=3)
    if config.encoding == "token":
        return of_tokens[:, :, :, :0].clone(), of_slots.clone()  # a view would keep all of it alive
    kept = []
    for part, size, absent in zip(
        (of_tokens, of_slots), (config.m_input_tokens, config.n_ssm_outputs), absent_in_block(config, steps), strict=True
    ):
        kept.append(take(part, absent[:, None] + torch.arange(size, device=steps.device), dim=3))
    return kept[0], kept[1]


def absent_in_block(config: SMTConfig, step: Index) -> tuple[Index, Index]:
    """How many tokens and slots at the start of the window of ``step``'s block lie before the sequence (``stride``)."""
    n_tokens, _ = existing(config, config.window.block_end(config.window.block_of(step)) + 1)
    _, n_slots = existing(config, step)
    return config.m_input_tokens - n_tokens, config.n_ssm_outputs - at_most(config.n_ssm_outputs, n_slots)
