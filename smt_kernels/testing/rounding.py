"""What a formula must lose to rounding, whoever computes it: itself in float64, with every operation off by a rounding of fp32.

    with Rounding(seed):
        results = reference(...)  # in float64, and its gradients

Inside, each operation of PyTorch that rounds is off by u = 2^-24, the most by which fp32 rounds a number, times what it rounds:

    a result of one operation       its magnitude
    a sum, or a product of matrices the sum of the magnitudes of its terms, since partial sums of n terms round n times
    exp(x)                          (1 + |x|) exp(x): kernels compute 2^(x / ln 2), and x / ln 2 is rounded
    softmax(s) = exp(s - lse)       (1 + |s| + |lse|) times a weight: both are rounded before they cancel
    its gradient P (dP - delta)     P (|dP| + sum P |dP|): likewise

The sign is random, an element at a time. So it is the error of an implementation of this very formula that is unlucky with each
rounding; it holds for kernels of every dtype, which all accumulate in fp32, and on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT = torch.finfo(torch.float32).eps / 2

_EXACT = {
    "_to_copy", "_unsafe_view", "abs", "amax", "cat", "clone", "constant_pad_nd", "copy_", "embedding", "fill_", "full",
    "full_like", "gather", "index", "index_select", "lift_fresh", "masked_fill", "max", "maximum", "min", "neg", "new_zeros",
    "ones_like", "relu", "scalar_tensor", "select_backward", "slice_backward", "stack", "tril", "where", "zero_", "zeros",
    "zeros_like",
}  # fmt: skip


def _of_softmax(weights: Tensor, scores: Tensor, dim: int, _: bool) -> list[Tensor]:
    lse = scores.logsumexp(dim, keepdim=True)
    return [weights * lse.abs().expand_as(weights), weights * scores.abs(), weights]


def _of_softmax_gradient(result: Tensor, grad: Tensor, weights: Tensor, dim: int, _: torch.dtype) -> list[Tensor]:
    return [weights * (weights * grad.abs()).sum(dim, keepdim=True), weights * grad.abs()]


# What an operation rounds, from its result and its arguments; a result itself where there is no entry.
_ROUNDED: dict[str, Callable[..., list[Tensor]]] = {
    "mm": lambda _, a, b: [a.abs() @ b.abs()],
    "bmm": lambda _, a, b: [a.abs() @ b.abs()],
    "addmm": lambda _, c, a, b, **scales: [c.abs() + a.abs() @ b.abs()],
    "sum": lambda _, x, *dims, **named: [torch.sum(x.abs(), *dims, **named)],
    "mean": lambda _, x, *dims, **named: [torch.mean(x.abs(), *dims, **named)],
    "exp": lambda y, x: [y, y * x.abs()],
    "silu": lambda y, x: [y, y * x.abs()],
    "silu_backward": lambda _, grad, x: [grad * (1 + x.abs())],
    "_softmax": _of_softmax,
    "_softmax_backward_data": _of_softmax_gradient,
}


class Rounding(TorchDispatchMode):
    """Operations inside on float64 are off by a rounding of fp32 each, of signs that ``seed`` chooses; see the module."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed, self._generators = seed, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2].partition(".")[0]
        if not isinstance(result, Tensor) or result.dtype != torch.float64 or function.is_view or name in _EXACT:
            return result
        for rounded in _ROUNDED[name](result, *args, **(kwargs or {})) if name in _ROUNDED else [result.clone()]:
            result.add_(self._signs(rounded) * rounded.nan_to_num(0.0, 0.0, 0.0), alpha=UNIT)
        return result

    def _signs(self, like: Tensor) -> Tensor:
        if like.device not in self._generators:
            self._generators[like.device] = torch.Generator(like.device).manual_seed(self._seed)
        drawn = torch.randint(2, like.shape, generator=self._generators[like.device], device=like.device, dtype=like.dtype)
        return 2 * drawn - 1
