"""The loss through the tied head in the precision of the step: its mean, and that of every target by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smt.runtime.precision import dtype_of_products, is_lowered
from smt_kernels import linear_cross_entropy
from smt_kernels.linear_cross_entropy import IGNORE_INDEX
from smt_kernels.precision import accumulation

# Logits that ``target_nats`` holds at a time: 64 MiB in float32.
CHUNK_LOGITS = 2**24


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per target of softmax(hidden weight^T), without ever holding all logits; 0 if none counts.

    Under autocast its products are in that dtype, as of any other head, and the gradient of a float32 weight is float32.

    Args:
        hidden: (B, T, d).
        weight: (V, d).
        targets: (B, T) integers, -100 to leave one out.
    """
    if is_lowered(hidden):
        hidden = hidden.to(dtype_of_products(hidden))
        if weight.dtype != torch.float32:
            weight = weight.to(hidden.dtype)
    return linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten().long())


def target_nats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden weight^T)[target] of every target, (B, T) in float32 at least; 0 where none counts.

    For a loss that is no mean over targets. The logits of some steps at a time exist, and are computed again in the backward
    pass: what a target weighs is known only when all of them are.

    Args:
        hidden, weight, targets: as in ``head_loss``; so is the dtype of the products.
    """
    size = max(1, CHUNK_LOGITS // len(weight))
    chunks = zip(hidden.flatten(0, 1).split(size), targets.flatten().long().split(size), strict=True)
    # Nothing is drawn in it, so there is no state of random numbers to restore.
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(_nats, rows, weight, some, **options) for rows, some in chunks]).view(targets.shape)


def _nats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(accumulation(logits), targets, ignore_index=IGNORE_INDEX, reduction="none")
