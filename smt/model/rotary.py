"""Rotary positions (Su et al., 2021): pairs of coordinates turn by an angle proportional to the absolute step."""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]


def rotation(step: Tensor, head_dim: int, theta: float) -> Rotation:
    """Cosines and sines (T, 1, head_dim / 2) in fp32 for steps (T,), angle = step * theta^(-2i / head_dim)."""
    # In fp64: past 2^24 steps an fp32 product no longer tells one step from the next.
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=step.device, dtype=torch.float64) / head_dim)
    angle = (step[:, None].double() * frequency)[:, None, :]
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn x (B, T, H, D): coordinate i pairs with coordinate i + D / 2."""
    cos, sin = (part.to(x.dtype) for part in turn)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
