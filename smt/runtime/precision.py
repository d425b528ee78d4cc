"""The number format that a model computes in on a device."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def precision(device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast on CUDA, full precision elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
