"""The device that a model runs on, and the number format that it computes in there."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def precision(device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast on CUDA, full precision elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def device_named(name: str) -> torch.device:
    """``cpu``, ``cuda``, or ``auto``: CUDA where there is a GPU.

    Raises:
        ValueError: there is no such device, or no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be one of auto, cpu, cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch finds no GPU; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
