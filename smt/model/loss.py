"""The loss through the tied head: ``smt_kernels.linear_cross_entropy`` in the precision of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels import linear_cross_entropy


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per target of softmax(hidden weight^T), without ever holding all logits; 0 if none counts.

    Under autocast its products are in that dtype, as of any other head, and the gradient of a float32 weight is float32.

    Args:
        hidden: (B, T, d).
        weight: (V, d).
        targets: (B, T) integers, -100 to leave one out.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
        if weight.dtype != torch.float32:
            weight = weight.to(hidden.dtype)
    return linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten().long())
