"""What a forward pass keeps for its backward pass: parts of several dtypes in one buffer, which operators take as one tensor.

Apart from the kernels, because the size of a buffer is asked for where triton may not be installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Kept = TypeVar("Kept", bound=tuple)
# Parts begin at multiples of it, as the memory of tensors does.
_ALIGNMENT = 256


class Part(NamedTuple):
    """One tensor of a buffer."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout(Generic[Kept]):
    """How what is kept lies in a buffer.

    Attributes:
        kind: the named tuple of what is kept.
        parts: its fields.
        dtype: of the buffer.
    """

    kind: type[Kept]
    parts: Mapping[str, Part]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Elements of the buffer."""
        return sum(_aligned(part.nbytes) for part in self.parts.values()) // self.dtype.itemsize

    def new(self, model: Tensor) -> tuple[Tensor, Kept]:
        """A buffer on the device of ``model``, uninitialised but for the gaps between parts, and its parts."""
        buffer = model.new_empty(self.size, dtype=self.dtype)
        data = buffer.view(torch.uint8)
        for start, part in _placed(self.parts):
            stop = start + part.nbytes
            if stop < start + _aligned(part.nbytes):  # or two runs would leave different bytes
                data[stop : start + _aligned(part.nbytes)].zero_()
        return buffer, self.of(buffer)

    def of(self, buffer: Tensor) -> Kept:
        """The parts of a buffer."""
        data = buffer.view(torch.uint8)
        placed = zip(self.parts, _placed(self.parts), strict=True)
        parts = {name: data[at : at + part.nbytes].view(part.dtype).view(part.shape) for name, (at, part) in placed}
        return self.kind(**parts)


def _placed(parts: Mapping[str, Part]) -> list[tuple[int, Part]]:
    """Each part with the byte that it starts at."""
    placed, start = [], 0
    for part in parts.values():
        placed.append((start, part))
        start += _aligned(part.nbytes)
    return placed


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
