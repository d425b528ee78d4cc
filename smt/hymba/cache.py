"""What decoding keeps of the past: keys and values of the layers that make them, and the states of SSMs.

A local layer keeps a ring of its window (``smt.state.rings``), a global one everything, in room that doubles when it is full.
The meta tokens' keys and values are the same for all rows, and kept once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from smt.hymba.attention import KeysAndValues
from smt.hymba.config import HymbaConfig
from smt.hymba.layers import SSMState
from smt.hymba.passes import Held
from smt.state.rings import from_ring, last_entries, to_ring


class LayerCache(NamedTuple):
    """What one layer keeps.

    Attributes:
        metas: (1, M, ...) keys and values of the meta tokens; None: it makes none.
        tokens: (B, room, ...) those of the tokens, at their steps, or in a local layer at their steps modulo the window.
        state: of its SSM.
        window: of a local layer.
    """

    metas: KeysAndValues | None
    tokens: KeysAndValues | None
    state: SSMState
    window: int | None

    def tensors(self) -> list[Tensor]:
        """All that there are."""
        return [part for parts in (self.metas, self.tokens, self.state) for part in parts or () if part is not None]

    def of_rows(self, rows: Tensor) -> LayerCache:
        """Those of the rows at ``rows`` (R,), which share the meta tokens."""
        tokens = self.tokens and tuple(part[rows] for part in self.tokens)
        return self._replace(tokens=tokens, state=tuple(None if part is None else part[rows] for part in self.state))


@dataclass
class HymbaCache:
    """The past of every row of a batch, which forward passes change in place: made by ``Hymba.new_cache``.

    Attributes:
        config: the model's.
        layers: what each layer keeps.
        lengths: how many tokens each row holds.
        device_lengths: the same, (B,) int64 on the device.
    """

    config: HymbaConfig
    layers: list[LayerCache]
    lengths: tuple[int, ...]
    device_lengths: Tensor

    @classmethod
    def of_metas(cls, config: HymbaConfig, left: Sequence[Held], batch_size: int, n_tokens: int) -> HymbaCache:
        """What ``batch_size`` rows hold before their first token.

        Args:
            left: what the meta tokens left in each layer.
            n_tokens: how many tokens global layers have room for at first.
        """

        def own(part: Tensor | None, *shape: int) -> Tensor | None:
            return None if part is None else part.expand(*shape, *part.shape[len(shape) :]).clone()

        layers = []
        for index, (plan, held) in enumerate(zip(config.layers(), left, strict=True)):
            state, metas, tokens = tuple(own(part, batch_size) for part in held.state), None, None
            window = config.sliding_window if plan.attention == "local" else None
            if plan.kv_source == index:
                room = n_tokens if window is None else window
                metas = tuple(own(part) for part in held.tokens)
                tokens = tuple(part.new_zeros(batch_size, room, *part.shape[2:]) for part in metas)
            layers.append(LayerCache(metas, tokens, state, window))
        device = next(part.device for layer in layers for part in layer.tensors())
        return cls(config, layers, (0,) * batch_size, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def check(self, config: HymbaConfig, batch_size: int, device: torch.device) -> None:
        """Raise ValueError unless this is of a model of ``config`` on ``device``, and of so many rows."""
        if self.config != config:
            raise ValueError("cache must be of a model of this configuration")
        if self.batch_size != batch_size:
            raise ValueError(f"cache must be of as many rows as input_ids, {batch_size}, got {self.batch_size}")
        if self.device_lengths.device != device:
            raise ValueError(f"cache must be on the model's device {device}, got {self.device_lengths.device}")

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all keys, values and states take, each counted once."""
        storages = (tensor.untyped_storage() for layer in self.layers for tensor in layer.tensors())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def clone(self) -> HymbaCache:
        """A copy that goes its own way."""
        return self.rows(torch.arange(self.batch_size, device=self.device_lengths.device))

    def rows(self, rows: Tensor) -> HymbaCache:
        """A copy of the rows at ``rows`` (R,) int64, in their order, repeated if they are."""
        alike = len(set(self.lengths)) == 1  # and nothing to read from the device
        lengths = self.lengths[:1] * len(rows) if alike else tuple(self.lengths[row] for row in rows.tolist())
        layers = [layer.of_rows(rows) for layer in self.layers]
        return replace(self, layers=layers, lengths=lengths, device_lengths=self.device_lengths[rows])

    def make_writable(self) -> None:
        """See that forward passes may change what a pass under ``torch.inference_mode`` has left, outside of it."""
        if not torch.compiler.is_compiling() and self.device_lengths.is_inference() and not torch.is_inference_mode_enabled():
            copied = self.clone()
            self.layers, self.device_lengths = copied.layers, copied.device_lengths

    def make_room(self, n_tokens: int) -> None:
        """See that global layers have room for ``n_tokens``."""
        for index, layer in enumerate(self.layers):
            if layer.tokens is not None and layer.window is None and layer.tokens[0].shape[1] < n_tokens:
                size = max(n_tokens, 2 * layer.tokens[0].shape[1])
                larger = tuple(part.new_zeros(part.shape[0], size, *part.shape[2:]) for part in layer.tokens)
                for new, old in zip(larger, layer.tokens, strict=True):
                    new[:, : old.shape[1]] = old
                self.layers[index] = layer._replace(tokens=larger)

    def held(self, index: int) -> Held:
        """What the layer ``index`` holds for the next tokens of rows that are all of one length."""
        layer, length = self.layers[index], self.lengths[0]
        if layer.tokens is None or length == 0:
            return Held(None, layer.state)
        if layer.window is None:
            return Held(tuple(part[:, :length] for part in layer.tokens), layer.state)
        stop, count = self.device_lengths[:1], min(length, layer.window - 1)
        return Held(tuple(from_ring(part, stop, count) for part in layer.tokens) if count else None, layer.state)

    def keep(self, held: Sequence[Held], n_new: int, counts: Sequence[int]) -> None:
        """Keep what all layers hold after up to ``n_new`` tokens more, of which row r took ``counts[r]``."""
        lengths = tuple(length + count for length, count in zip(self.lengths, counts, strict=True))
        stops = torch.tensor(lengths, device=self.device_lengths.device)
        self.make_room(self.lengths[0] + n_new)
        for layer, of_layer in zip(self.layers, held, strict=True):
            for old, new in zip(layer.state, of_layer.state, strict=True):
                if old is not None:
                    old.copy_(new)
            for old, new in zip(layer.tokens or (), of_layer.tokens or (), strict=True):
                if layer.window is None:  # what lies behind a row's end is not looked at, and overwritten
                    old[:, self.lengths[0] : self.lengths[0] + n_new] = new[:, -n_new:]
                else:
                    first = self.lengths[0] + n_new - new.shape[1]
                    old.copy_(to_ring(last_entries(new, stops - first, layer.window), stops))
        self.lengths, self.device_lengths = lengths, stops


def valid_counts(n_valid: Tensor, input_ids: Tensor) -> tuple[int, ...]:
    """How many tokens of each row of ``input_ids`` (B, T) are not padding on its right.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: not of shape (B,), or out of range.
    """
    if not isinstance(n_valid, Tensor) or n_valid.dtype not in (torch.int64, torch.int32):
        got = n_valid.dtype if isinstance(n_valid, Tensor) else type(n_valid).__name__
        raise TypeError(f"n_valid must be an int64 or int32 tensor, got {got}")
    batch, length = input_ids.shape
    if n_valid.shape != (batch,):
        raise ValueError(f"n_valid must have shape (B={batch},), got {tuple(n_valid.shape)}")
    counts = tuple(n_valid.tolist())
    if min(counts) < 0 or max(counts) > length:
        raise ValueError(f"n_valid must lie in 0..T = 0..{length}, got {counts}")
    return counts
