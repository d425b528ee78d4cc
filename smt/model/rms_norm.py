"""RMSNorm as one node of the autograd graph: on a CPU PyTorch's own is a chain of small operations, and of their gradients.

y = x r w with r = rsqrt(mean(x^2) + eps);   dx = r (g - x r^2 mean(g x)) with g = dy w;   dw = sum(dy x r)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smt_kernels.operators import is_transformed


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` of one dimension, with its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d), in the dtype of x."""
        # What is compiled, or runs in mixed precision or on a GPU, has a kernel of its own; ``torch.func`` takes PyTorch's.
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype in (torch.float32, torch.float64)
        if not plain or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or is_transformed():
            # Of two dtypes PyTorch makes a chain of small operations, and warns; it computes in the wider one in any case.
            wide = torch.promote_types(x.dtype, self.weight.dtype)
            return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        normalised = x * inverse
        ctx.save_for_backward(normalised, inverse, weight)
        return normalised * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normalised, inverse, weight = ctx.saved_tensors
        d_weight = (grad * normalised).view(-1, grad.shape[-1]).sum(0)
        d_normalised = grad * weight
        along = torch.linalg.vecdot(d_normalised, normalised)[..., None]
        dx = d_normalised.addcmul_(normalised, along, value=-1 / normalised.shape[-1]).mul_(inverse)
        return dx, d_weight, None
