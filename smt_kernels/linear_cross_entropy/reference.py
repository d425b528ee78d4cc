"""The definition of the loss through a linear head, in plain PyTorch: any floating dtype, no cleverness."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from smt_kernels.operators import unaffected_by_autocast
from smt_kernels.precision import accumulation


@unaffected_by_autocast
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int) -> Tensor:
    """hidden (N, d), weight (V, d), targets (N,). Returns a scalar. See the package docstring."""
    logits = accumulation(F.linear(hidden, weight.to(hidden.dtype)))  # (N, V)
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)
