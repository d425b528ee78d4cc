"""A linear layer shared by many uses of one pass has the outputs and gradients of the plain layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smt.model.shared_linear import SharedLinear


@pytest.fixture
def layer():
    return nn.Linear(5, 7, bias=False, dtype=torch.float64)


def chain(apply, x):
    """Three uses, the last two of what came before, so that gradients meet on the way."""
    first = apply(x)
    second = apply(first[..., :5].tanh())
    return second + apply(second[:1, :, 2:].sin())


def gradients(layer, apply, x):
    return torch.autograd.grad(chain(apply, x).square().sum(), [x, layer.weight])


def test_outputs_and_gradients_are_those_of_the_layer(layer):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(chain(SharedLinear(layer), x), chain(layer, x), rtol=0, atol=0)
    for got, want in zip(gradients(layer, SharedLinear(layer), x), gradients(layer, layer, x), strict=True):
        torch.testing.assert_close(got, want)


def test_a_backward_pass_that_leaves_the_weight_out_does_not_change_the_next(layer):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    out = chain(SharedLinear(layer), x).square().sum()
    torch.autograd.grad(out, x, retain_graph=True)
    for _ in range(2):
        (got,) = torch.autograd.grad(out, layer.weight, retain_graph=True)
        torch.testing.assert_close(got, gradients(layer, layer, x)[1])


def test_a_frozen_weight_passes_gradients_on(layer):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    layer.requires_grad_(False)
    (got,) = torch.autograd.grad(chain(SharedLinear(layer), x).sum(), x)
    (want,) = torch.autograd.grad(chain(layer, x).sum(), x)
    torch.testing.assert_close(got, want)


def test_mixed_precision_is_that_of_the_layer():
    layer, x = nn.Linear(5, 7, bias=False), torch.randn(2, 3, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(SharedLinear(layer)(x).float().sum(), [x, layer.weight])
        want = torch.autograd.grad(layer(x).float().sum(), [x, layer.weight])
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
