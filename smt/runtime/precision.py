"""The number format that a model computes in on a device, and under autocast."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

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
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def is_lowered(x: Tensor) -> bool:
    """Whether products of x are in the dtype of autocast: it is on, and x is not in fp64. There is none of meta tensors."""
    device = x.device.type
    return device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype that x is multiplied in: that of autocast, where it is on and x is not in fp64, or its own."""
    return torch.get_autocast_dtype(x.device.type) if is_lowered(x) else x.dtype


_capability = functools.cache(torch.cuda.get_device_capability)
