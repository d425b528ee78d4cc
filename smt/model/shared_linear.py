"""A linear layer that one pass applies many times to a few rows, and whose weight gradient is formed once for all of them.

Autograd alone would, for every use, write a gradient as large as the weight and add it to the sum so far: for the 8 rows of a
group of writes that is more memory traffic than the products themselves. Here each use leaves its rows behind,
and the weight's own node in the graph, which autograd reaches after the last of them, multiplies them in one go.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smt.model.weights import is_plain


class SharedLinear:
    """The application of ``linear``, which has no bias, for the length of one forward pass."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear
        self._uses: list[tuple[int, Tensor, Tensor]] = []
        # What is compiled, runs in mixed precision, or is more than a product with its weight is called, each time.
        called = torch.compiler.is_compiling() or not is_plain(linear, nn.Linear)
        if called or torch.is_autocast_enabled(linear.weight.device.type):
            self._token = None
        else:
            self._weight = linear.weight
            self._token = _Weight.apply(self._weight, self._uses)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self._token is None:
            return self._linear(x)
        return _Use.apply(x, self._token, self._weight.detach(), self._uses)


class _Weight(torch.autograd.Function):
    """A scalar that stands for the weight in the graph, so that autograd comes here after all uses of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, uses: list[tuple[int, Tensor, Tensor]]) -> Tensor:
        ctx.uses = uses
        return weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        _, inputs, grads = zip(*ctx.uses, strict=True)
        ctx.uses.clear()
        return torch.cat(grads).T @ torch.cat(inputs), None


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, weight: Tensor, uses: list[tuple[int, Tensor, Tensor]]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.uses = uses
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad @ weight, None, None, None
        here = torch._C._current_graph_task_id()
        if ctx.uses and ctx.uses[-1][0] != here:  # of a pass that never came to the weight
            ctx.uses.clear()
        ctx.uses.append((here, x.flatten(0, -2), grad.flatten(0, -2)))
        return grad @ weight, grad.new_zeros(()), None, None
