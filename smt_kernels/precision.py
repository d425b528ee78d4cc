"""In which dtype sums are formed, and the constant between exponentials of base e and of base 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, and float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulation(x: Tensor) -> Tensor:
    """x in its accumulation dtype."""
    return x if x.dtype == torch.float64 else x.float()
