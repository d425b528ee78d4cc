"""The number format that a model computes in on a device, and under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def precision(device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast on CUDA, full precision elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype that x is multiplied in: that of autocast, where it is on and x is not in fp64, or its own."""
    device = x.device.type
    lowered = x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if lowered else x.dtype
