"""The products of the loss, a chunk of rows at a time, so that only the logits of one chunk exist.

    Z = H W^T,   G = softmax(Z) - onehot(targets)  (0 where a target does not count),   dH = G W,   dW = G^T H

G lies in [-1, 1] and is multiplied in the dtype of H. The loss is a mean over count targets, so its gradients are these times
grad_loss / count: a factor that the backward pass, which has nothing else to do, applies in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smt_kernels.precision import accumulation_dtype

# Turns the logits of a chunk into G and writes the loss of each of its rows: (logits, targets, losses, wants G) -> G.
SoftmaxStep = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    wants_hidden: bool,
    wants_weight: bool,
    n_rows: int,
    step: SoftmaxStep,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss, count, dH in the dtype of hidden and dW in the accumulation dtype, empty where not wanted.

    Args:
        hidden, weight: (N, d) and (V, d), of one dtype.
        n_rows: of one chunk.
        step: the softmax.
    """
    dtype = accumulation_dtype(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=dtype)
    grad_hidden = hidden.new_empty(hidden.shape if wants_hidden else 0)
    grad_weight = hidden.new_zeros(weight.shape if wants_weight else 0, dtype=dtype)
    buffer = hidden.new_empty(min(n_rows, len(hidden)), len(weight))
    for start in range(0, len(hidden), n_rows):
        chunk = slice(start, min(start + n_rows, len(hidden)))
        rows, logits = hidden[chunk], buffer[: chunk.stop - start]
        torch.mm(rows, weight.mT, out=logits)
        grad = step(logits, targets[chunk], losses[chunk], wants_hidden or wants_weight)
        if wants_hidden:
            torch.mm(grad, weight, out=grad_hidden[chunk])
        if wants_weight:
            _add_product(grad_weight, grad.mT, rows)
    count = (targets != ignore_index).sum().clamp(min=1)
    return losses.sum() / count, count, grad_hidden, grad_weight


def backward(
    grad_loss: Tensor,
    count: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight in their dtypes, from what ``loss_and_gradients`` returned; empty where not wanted."""
    # Of one dimension, so that it takes part in the choice of the dtype to multiply in.
    scale = (grad_loss / count).reshape(1)
    scaled = hidden.new_empty(grad_hidden.shape), weight.new_empty(grad_weight.shape)
    return torch.mul(grad_hidden, scale, out=scaled[0]), torch.mul(grad_weight, scale, out=scaled[1])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in the dtype of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda" and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # no other library multiplies in one dtype and adds to another
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
