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


def parts_of(buffer: Tensor, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The tensors of a buffer of ``buffer_size`` elements."""
    data, start, tensors = buffer.view(torch.uint8), 0, {}
    for name, part in parts.items():
        tensors[name] = data[start : start + part.nbytes].view(part.dtype).view(part.shape)
        start += _aligned(part.nbytes)
    return tensors


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
