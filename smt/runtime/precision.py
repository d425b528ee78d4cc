"""The number format that a model computes in on a device, and under autocast."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor

AMPERE = (8, 0)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has units that multiply it, as GPUs from Ampere on; others only emulate it."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or _capability(device) >= AMPERE


def precision(device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast where a GPU has units for it, full precision elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype that x is multiplied in: that of autocast, where it is on and x is not in fp64, or its own."""
    device = x.device.type
    lowered = x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if lowered else x.dtype


_capability = functools.cache(torch.cuda.get_device_capability)
