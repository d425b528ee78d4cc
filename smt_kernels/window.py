"""Who sees whom: the only place where the arithmetic of windows, writes and blocks is done.

Every function takes an int or an integer tensor and returns the same kind, element by element. Steps are 0-based. Nothing
here asks whether an entry *exists* (a slot before the first write, a token before the first step): negative indices
simply name entries that do not, and callers intersect with what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Index = TypeVar("Index", int, Tensor)


def _at_least_zero(value: Index) -> Index:
    return value * (value > 0)


@dataclass(frozen=True)
class WindowSpec:
    """The fixed window: the last ``n_memory`` slots and the last ``n_tokens`` tokens, one write every ``stride`` steps.

    ``stride=None`` means static memory: nothing is ever written and every slot is visible to every query (meta tokens).

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is out of range (``n_memory >= 0``, ``n_tokens >= 0``, ``1 <= stride <= n_tokens``).
    """

    n_memory: int = 15
    n_tokens: int = 50
    stride: int | None = 16

    def __post_init__(self) -> None:
        for name in ("n_memory", "n_tokens", "stride"):
            value = getattr(self, name)
            if (not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool)) and not (
                name == "stride" and value is None
            ):
                raise TypeError(f"{name} must be an int, got {value!r}")
        if self.n_memory < 0:
            raise ValueError(f"n_memory must be at least 0, got {self.n_memory}")
        if self.n_tokens < 0:
            raise ValueError(f"n_tokens must be at least 0, got {self.n_tokens}")
        if self.stride is not None and not 1 <= self.stride <= self.n_tokens:
            raise ValueError(f"stride must lie in 1..n_tokens = 1..{self.n_tokens}, got {self.stride}")

    @property
    def size(self) -> int:
        """Entries in the window, W = n_memory + n_tokens."""
        return self.n_memory + self.n_tokens

    def writes_before(self, step: Index) -> Index:
        """How many writes step ``step`` can see: those made after the logits of earlier steps, 0 for step <= 0."""
        return _at_least_zero(step - 1) // self._required_stride

    def write_step(self, write: Index) -> Index:
        """The step at whose end write ``write`` (0-based) is made."""
        return self._required_stride * (write + 1)

    def writes_made(self, n_steps: Index) -> Index:
        """How many writes a sequence of ``n_steps`` steps makes, the one at its last step included."""
        return self.writes_before(n_steps)

    def visible_tokens(self, step: Index) -> tuple[Index, Index]:
        """Steps [start, stop) of the tokens that ``step`` sees."""
        return step - self.n_tokens + 1, step + 1

    def visible_slots(self, step: Index) -> tuple[Index, Index]:
        """Slots [start, stop) that ``step`` sees: the last ``n_memory`` of those written before it."""
        written = self.writes_before(step)
        return written - self.n_memory, written

    def pooled_slots(self, write: Index, group: int) -> tuple[Index, Index]:
        """Slots [start, stop) that the pooling of ``write`` sees: the last ``n_memory`` of earlier groups of writes."""
        group_start = write // group * group
        return group_start - self.n_memory, group_start

    def canonical_step(self, step: int, group: int = 1) -> int:
        """The smallest step that is equivalent to ``step``: whatever follows is the same, counted from there.

        As many tokens and slots exist before it, of those that a window or the pooling of a group of ``group`` writes sees,
        and it has the same position between two writes and in their group. So what is made for it (a compiled program, a
        recorded graph) serves every later step of its kind.
        """
        if self.stride is None:
            return min(step, self.n_tokens)
        complete = max(self.n_tokens, self.write_step(self.n_memory + group - 2) + 1)
        return step if step < complete else complete + (step - complete) % (self.stride * group)

    def block_of(self, step: Index) -> Index:
        """The block b whose steps (stride * (b - 1), stride * b] share one window; step 0 is block 0 alone."""
        return (step + self._required_stride - 1) // self._required_stride

    def block_end(self, block: Index) -> Index:
        """The last step of a block, where its window ends."""
        return self._required_stride * block

    def token_visible(self, query_step: Tensor, key_step: Tensor) -> Tensor:
        """Which tokens (S,) each query (T,) sees, as bool (T, S)."""
        start, stop = self.visible_tokens(query_step[:, None])
        return (key_step >= start) & (key_step < stop)

    def slot_visible(self, query_step: Tensor, slot: Tensor) -> Tensor:
        """Which slots (K,) each query (T,) sees, as bool (T, K)."""
        if self.stride is None:
            return torch.ones(len(query_step), len(slot), dtype=torch.bool, device=slot.device)
        start, stop = self.visible_slots(query_step[:, None])
        return (slot >= start) & (slot < stop)

    def entry_exists(self, valid_memory: Tensor | None, valid_tokens: Tensor | None, device: torch.device) -> Tensor:
        """Which entries of a window exist when each right-aligned half holds ``valid_*`` (N,) of them, as bool (N or 1, W)."""
        from_right = torch.arange(self.size - 1, -1, -1, device=device)  # 0 at the newest entry of a half
        memory = from_right[: self.n_memory] - self.n_tokens
        tokens = from_right[self.n_memory :]
        halves = [
            index[None] >= 0 if valid is None else index[None] < valid[:, None]
            for index, valid in ((memory, valid_memory), (tokens, valid_tokens))
        ]
        rows = max(half.shape[0] for half in halves)
        return torch.cat([half.expand(rows, -1) for half in halves], dim=1)

    def window_visible(
        self, n_queries: int, valid_memory: Tensor | None, valid_tokens: Tensor | None, device: torch.device
    ) -> Tensor:
        """Which entries the last T = ``n_queries`` ones of a window see (existing, not later), as bool (N or 1, T, W)."""
        position = torch.arange(self.size, device=device)
        causal = position[None, :] <= position[self.size - n_queries :, None]
        return causal[None] & self.entry_exists(valid_memory, valid_tokens, device)[:, None, :]

    @property
    def _required_stride(self) -> int:
        if self.stride is None:
            raise ValueError("this window has static memory (stride=None): nothing is ever written, so it has no write steps")
        return self.stride
