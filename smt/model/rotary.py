"""Rotary positions (Su et al., 2021): pairs of coordinates turn by an angle proportional to the absolute step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smt_kernels.operators import is_transformed

Rotation = tuple[Tensor, Tensor]

# A whole turn, of which angles are integer parts: 64-bit products leave out whole turns, and the angle of every step is exact
# to the last bit of an fp32 number. In floating point the step itself would not be, from 2^24 on.
TURN = 2**64


def rotation(step: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """What ``rotate`` multiplies heads of the ``dtype`` by at steps (T,) int64: (T, 1, head_dim) each.

    The angle is step * theta^(-2i / head_dim) for coordinate i of either half; cosines, and sines with their sign, are
    computed in fp32 at least.
    """
    wide = torch.promote_types(dtype, torch.float32)
    table, fake = _frequencies(head_dim, theta, step.device), getattr(step, "fake_mode", None)
    parts = step[:, None, None] * (table if fake is None else fake.from_tensor(table))
    angle = parts.to(wide) * (2 * math.pi / TURN)
    sine = angle.sin()
    return angle.cos().to(dtype), torch.cat([-sine[..., : head_dim // 2], sine[..., head_dim // 2 :]], dim=-1).to(dtype)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn x (B, T, H, D): coordinate i pairs with coordinate i + D / 2."""
    cosine, sine = turn
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, dims=-1), sine)


def split_and_turn(heads: Tensor, sizes: Sequence[int], turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Heads (B, T, H + 2 H_kv, D) of queries, keys and values, the ``sizes`` of each: the queries and keys turned."""
    one_node = heads.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed()
    if one_node:
        return _SplitAndTurn.apply(heads, *turn, tuple(sizes))
    n_queries, n_keys, n_values = sizes
    q_and_k, v = heads.split([n_queries + n_keys, n_values], dim=-2)
    return *rotate(q_and_k, turn).split([n_queries, n_keys], dim=-2), v


class _SplitAndTurn(torch.autograd.Function):
    """The same as one node of the graph, whose gradients are gathered once and turned back where they lie."""

    @staticmethod
    def forward(heads: Tensor, cosine: Tensor, sine: Tensor, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return split_and_turn(heads, sizes, (cosine, sine))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, cosine, sine, ctx.sizes = inputs
        ctx.save_for_backward(cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        d_heads = torch.cat(grads, dim=-2)
        turned = d_heads[..., : sum(ctx.sizes[:2]), :]
        crosswise = (turned * sine).roll(turned.shape[-1] // 2, dims=-1)
        torch.addcmul(crosswise, turned, cosine, out=turned)
        return d_heads, None, None, None


def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """(head_dim,) int64: the angle from one step to the next, in parts of a turn, of the coordinates of both halves."""
    if torch.compiler.is_compiling():
        return torch.tensor(_parts(head_dim, theta), device=device)
    key = head_dim, theta, device
    if key not in _of_device:
        made = torch.tensor(_parts(head_dim, theta), device=device)
        if type(made) is not Tensor:  # of a mode that traces: it must not stay
            return made
        _of_device[key] = made
    return _of_device[key]


_of_device: dict[tuple[int, float, torch.device], Tensor] = {}


def _parts(head_dim: int, theta: float) -> list[int]:
    parts = [round(theta ** (-2 * i / head_dim) / (2 * math.pi) * TURN) for i in range(head_dim // 2)]
    return [part - TURN if part >= TURN // 2 else part for part in parts] * 2
