"""In which dtype sums are formed, and the constants of all formulas: the norms' epsilon, and from base e to base 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
# Of every norm of the model, as GPT-2 and Mamba have it.
NORM_EPS = 1e-5


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, and float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def copied(x: Tensor, model: Tensor) -> Tensor:
    """x in memory of its own, contiguous, in the dtype of ``model``."""
    return x.to(model.dtype, memory_format=torch.contiguous_format, copy=True)


def accumulation(x: Tensor) -> Tensor:
    """x in its accumulation dtype."""
    return x if x.dtype == torch.float64 else x.float()
