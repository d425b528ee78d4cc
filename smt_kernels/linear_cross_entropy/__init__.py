"""Cross-entropy of a linear head, with its gradients, without ever holding all logits.

loss = mean_i (ln sum_v exp(hidden_i . weight_v) - hidden_i . weight_target_i)    over the targets that count

The folder, in the order to read it:

    reference.py   the definition
    chunks.py      the products, rows at a time, and what the backward pass has left to do
    blocked.py     the softmax of a chunk of logits in plain PyTorch, for any device
    kernels.py     the same in place, in one Triton kernel, and the vocabulary that its products are padded to
"""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels import backends, checks
from smt_kernels.linear_cross_entropy.reference import linear_cross_entropy as reference
from smt_kernels.operators import is_transformed, register
from smt_kernels.precision import accumulation_dtype

IGNORE_INDEX = -100  # a target that the loss does not count, as in PyTorch


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX, backend: str | None = None
) -> Tensor:
    """Mean cross-entropy of softmax(hidden weight^T), in nats per target that counts; 0 where none does.

    The gradients are formed with the loss, a chunk of rows at a time, so that no logits are kept or computed twice; and only
    those that are asked for. Products are in the dtype of hidden, softmax, loss and all sums over rows in float32. What is
    multiplied in the dtype of hidden is softmax minus one-hot, in [-1, 1]; the number of targets and the gradient of the loss
    divide and multiply afterwards, in float32. So neither is lost in float16.

    Args:
        hidden: (N, d).
        weight: (V, d) in the dtype of hidden or in float32; its gradient has its dtype.
        targets: (N,) int64, the class of each row, or ``ignore_index``, which does not count and has no gradient.
        ignore_index: as in ``torch.nn.functional.cross_entropy``.
        backend: ``triton``, ``blocked`` or ``reference``; None: see ``smt_kernels.backends``.

    Returns:
        a scalar in float32 (float64 for float64).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit.
        IndexError: a target that is no class, where PyTorch sees it; in the Triton kernel it makes the loss NaN.

    Source: gradients with the loss as in Liger-Kernel (Hsu et al., 2024), section 3.2.
    """
    _check(hidden, weight, targets)
    checks.integer("ignore_index", ignore_index)
    backend = backends.choose("linear_cross_entropy", hidden, backend)
    if backend == "reference":
        return reference(hidden, weight, targets, ignore_index=ignore_index)
    # What ``torch.func`` maps over does not tell that it has a gradient.
    wanted = [torch.is_grad_enabled() and (tensor.requires_grad or is_transformed()) for tensor in (hidden, weight)]
    loss, *_ = _run(hidden, weight, targets, ignore_index, *wanted, backend=backend)
    return loss


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    checks.shape("hidden", hidden, {"N": None, "d": None})
    checks.floating("hidden", hidden)
    checks.shape("weight", weight, {"V": None, "d": hidden.shape[1]})
    checks.like("weight", weight, "hidden", hidden, dtype=False)
    allowed = dict.fromkeys((hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)))
    if weight.dtype not in allowed:
        raise TypeError(f"weight must be {' or '.join(map(str, allowed))} for hidden of {hidden.dtype}, got {weight.dtype}")
    checks.shape("targets", targets, {"N": hidden.shape[0]})
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    checks.like("targets", targets, "hidden", hidden, dtype=False)


def _empty(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, wants_hidden: bool, wants_weight: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, how many targets count, and the sums over rows that its gradients are made of, empty where not wanted."""
    dtype = accumulation_dtype(hidden.dtype)
    of_hidden = hidden.new_empty(hidden.shape if wants_hidden else 0)
    of_weight = weight.new_empty(weight.shape if wants_weight else 0, dtype=dtype)
    return hidden.new_empty((), dtype=dtype), targets.new_empty(()), of_hidden, of_weight


def _empty_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, wants_hidden: bool, wants_weight: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Those of hidden and weight, empty where not wanted."""
    return hidden.new_empty(hidden.shape if wants_hidden else 0), weight.new_empty(weight.shape if wants_weight else 0)


_run = register(_empty, kept=3, gradients=2, empty_gradients=_empty_gradients)
