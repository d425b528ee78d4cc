"""Loss and gradients of a linear head in plain PyTorch, chunk by chunk; runs on any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from smt_kernels.linear_cross_entropy.chunks import backward, loss_and_gradients
from smt_kernels.precision import accumulation_dtype

__all__ = ["backward", "forward"]

# Logits of a chunk: enough for full-speed products, and on a CPU few enough to stay in its caches.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns what ``chunks.loss_and_gradients`` does; arguments as in the package docstring."""

    def step(logits: Tensor, target: Tensor, losses: Tensor, wants_gradient: bool) -> Tensor:
        log_probs = F.log_softmax(logits, dim=-1, dtype=accumulation_dtype(logits.dtype))
        losses.copy_(F.nll_loss(log_probs, target, ignore_index=ignore_index, reduction="none"))
        if not wants_gradient:
            return logits
        grad = log_probs.exp_()
        grad.scatter_add_(1, target.clamp(0, grad.shape[1] - 1)[:, None], grad.new_full((len(grad), 1), -1.0))
        ignored = target == ignore_index
        if grad.device.type != "cpu" or ignored.any():  # other devices are not asked
            grad.masked_fill_(ignored[:, None], 0.0)
        return grad.to(logits.dtype)

    n_rows = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 2**22) // len(weight))
    wanted = wants_hidden, wants_weight
    return loss_and_gradients(hidden, weight.to(hidden.dtype), targets, ignore_index, *wanted, n_rows, step)
