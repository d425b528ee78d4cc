"""Operations called straight, as an autograd function, where nothing looks at operators.

A custom operator is what ``torch.compile``, ``opcheck`` and dispatch modes see of an operation. Its schema and dispatch cost
about 0.1 ms per call forward and backward on a CPU: as much as dozens of the small operations that a call on a few rows is
made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def direct(
    operator: Callable[..., Any],
    compute: Callable[..., Any],
    setup_context: Callable[[Any, Any, Any], None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """A function that computes what ``operator`` does, with the same gradients, and calls it only where that is observed.

    Args:
        operator: a custom operator.
        compute: its implementation, in plain Python.
        setup_context, gradients: as its ``register_autograd`` takes them; ``gradients`` calls no operator.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = compute(*inputs)
            setup_context(ctx, inputs, output)
            return output

        backward = staticmethod(once_differentiable(gradients))

    return lambda *inputs: (operator if _observed() else Direct.apply)(*inputs)


def _observed() -> bool:
    """Whether a compiler or a dispatch mode is at work."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
