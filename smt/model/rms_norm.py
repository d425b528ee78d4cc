"""RMSNorm of inputs and weights that need not have one dtype: y = x w / sqrt(mean(x^2) + eps)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` of one dimension, with its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d), in the dtype of x."""
        # Of two dtypes PyTorch makes a chain of small operations, and warns; it computes in the wider one in any case.
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)
