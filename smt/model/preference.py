"""How much more likely a model finds one completion than another, and the loss that widens it (ORPO).

    l = mean log-probability of the completion's tokens,   P = e^l,   odds = P / (1 - P)
    loss = -log sigmoid(log odds(chosen) - log odds(rejected))

Source: Hong, Lee and Thorne, 2024, arXiv:2403.07691, equations 4 to 7.

Both ends have a bound, because beyond it a difference of two log odds is no number. Above, P is known no nearer to 1 than eps
of its dtype, by which a logit and its normaliser are rounded: l is at most -eps, and log odds at most -log eps. Below, l is at
least a quarter of the lowest number. The bounds are of values, and gradients pass them: a rejected completion with P = 1 is
what the loss must push down, so a clamp, whose gradient is 0 there, would be wrong. They stay finite. As P of the chosen goes
to 1 its derivative goes to -odds(rejected), not to 0 times infinity. As P of the rejected does, its derivative is at most 1 /
eps, and behind it the softmax brings a factor of the size of 1 - P.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smt_kernels.precision import accumulation

LN_2 = math.log(2)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, to the last digits at both ends: of 1 + y where e^x is small, of -expm1 where it is near 1.

    Source: Maechler, 2012, "Accurately computing log(1 - exp(-|a|))", equation 7.
    """
    # Each branch is given what it can take: a NaN of the one that is not chosen would be in the gradient.
    far, near = x.clamp(max=-LN_2), x.clamp(min=-LN_2)
    return torch.where(x < -LN_2, torch.log1p(-torch.exp(far)), torch.log(-torch.expm1(near)))


def log_odds(log_p: Tensor) -> Tensor:
    """log(P / (1 - P)) of log P, both in float32 at least; finite, and so is its gradient, wherever log P is a number <= 0."""
    bounded = _Bounded.apply(accumulation(log_p))
    return bounded - log1mexp(bounded)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)) of each pair, given both mean log-probabilities, (N,)."""
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


class _Bounded(torch.autograd.Function):
    """A log-probability in the range where the difference of two log odds is finite; its gradient is that of the bound."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor) -> Tensor:
        limits = torch.finfo(log_p.dtype)
        return log_p.clamp(min=limits.min / 4, max=-limits.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
