"""Cross-entropy through the tied head without ever holding all logits: T x V numbers would be the largest tensor of a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smt.data.walk import IGNORE_INDEX

# Logits held at once: enough for full-speed matrix products, small beside the weights.
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(hidden @ weight^T) over the targets that are not ``IGNORE_INDEX``.

    The gradients are formed together with the loss, chunk by chunk, so that no logits are kept or computed twice.

    Args:
        hidden: (N, d).
        weight: (V, d) in the dtype of hidden.
        targets: (N,) int64.

    Returns:
        A scalar in fp32 (fp64 for fp64); 0 if every target is ignored.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, wants_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
        rows = max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 2**22) // weight.shape[0])
        statistics = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), device=hidden.device, dtype=statistics)
        count = (targets != IGNORE_INDEX).sum().clamp(min=1)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=statistics) if wants_gradient else None
        for start in range(0, hidden.shape[0], rows):
            chunk, target = hidden[start : start + rows], targets[start : start + rows]
            log_probs = F.log_softmax(chunk @ weight.mT, dim=-1, dtype=statistics)
            total += F.nll_loss(log_probs, target, ignore_index=IGNORE_INDEX, reduction="sum")
            if wants_gradient:
                counted = (target != IGNORE_INDEX)[:, None]
                grad = log_probs.exp_()
                grad.scatter_add_(1, target.clamp(min=0)[:, None], -torch.ones_like(grad[:, :1]))
                grad = (grad * (counted / count)).to(hidden.dtype)
                torch.matmul(grad, weight, out=grad_hidden[start : start + rows])
                grad_weight += grad.mT @ chunk
        if wants_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight * grad_loss.to(grad_weight.dtype), None, None
