"""Where a command computes, and how what it reads gets there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton


def find_device(name: str) -> torch.device:
    """A device by name; ``auto``: a GPU if there is one.

    Raises:
        ValueError: a GPU that is not there, or no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but PyTorch finds no GPU; use --device cpu")
    return device


def compiler_is_missing(device: torch.device) -> str | None:
    """Why ``torch.compile`` has nothing to compile with for ``device``; None: it has."""
    if device.type != "cuda" or has_triton():
        return None
    return f"torch.compile needs Triton, and a GPU of capability 7.0 or later, for {device}"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``; a GPU copies it when it comes to it, and nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def from_host(values: Sequence[Any], device: torch.device) -> Tensor:
    """``torch.tensor(values, device=device)``, for which nobody waits either.

    Raises:
        RuntimeError: a CUDA graph is being recorded, which would read this memory of the host when it is another's.
    """
    runs = device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_initialized()
    if not runs or torch.cuda.is_current_stream_capturing():
        return torch.tensor(values, device=device)
    return sent(torch.tensor(values, device="cpu"), device)
