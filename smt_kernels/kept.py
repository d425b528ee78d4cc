"""What a forward pass keeps for its backward pass: parts of several dtypes in one buffer, which operators take as one tensor.

Apart from the kernels, because the size of a buffer is asked for where triton may not be installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Parts begin at multiples of it, as the memory of tensors does.
_ALIGNMENT = 256


class Part(NamedTuple):
    """One tensor of a buffer."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def buffer_size(parts: Mapping[str, Part], dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that hold ``parts``."""
    return sum(_aligned(part.nbytes) for part in parts.values()) // dtype.itemsize


def new_buffer(model: Tensor, parts: Mapping[str, Part], dtype: torch.dtype) -> Tensor:
    """Memory for ``parts`` on the device of ``model``, uninitialised but for the gaps between them."""
    buffer = model.new_empty(buffer_size(parts, dtype), dtype=dtype)
    data = buffer.view(torch.uint8)
    for start, part in _placed(parts):
        stop = start + part.nbytes
        if stop < start + _aligned(part.nbytes):  # or two runs would leave different bytes
            data[stop : start + _aligned(part.nbytes)].zero_()
    return buffer


def parts_of(buffer: Tensor, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The tensors of a buffer of ``buffer_size`` elements."""
    data = buffer.view(torch.uint8)
    return {
        name: data[start : start + part.nbytes].view(part.dtype).view(part.shape)
        for name, (start, part) in zip(parts, _placed(parts), strict=True)
    }


def _placed(parts: Mapping[str, Part]) -> list[tuple[int, Part]]:
    """Each part with the byte that it starts at."""
    placed, start = [], 0
    for part in parts.values():
        placed.append((start, part))
        start += _aligned(part.nbytes)
    return placed


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
