"""Positions: exact to the last bits of fp32 at any step, and relative ones the same wherever they are."""

from __future__ import annotations

import math

import pytest
import torch

from smt.model.rotary import rotate, rotation, split_and_turn

HEAD_DIM, THETA = 16, 10000.0
FAR = [0, 1, 4095, 65_536, 2**24 + 1, 2**31 - 1, 2**40 + 12_345]


def test_angles_are_those_of_double_precision():
    steps = torch.tensor([-37, 0, 1, 50, 4096, 100_003, 2**24 + 1])
    frequency = THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angle = (steps[:, None].double() * frequency)[:, None]
    cosine, sine = rotation(steps, HEAD_DIM, THETA, torch.float32)
    assert cosine.dtype == sine.dtype == torch.float32
    # Half a unit in the last place of an angle of up to pi, and of its cosine.
    expected = torch.cat([angle, angle], dim=-1)
    torch.testing.assert_close(cosine.double(), expected.cos(), rtol=0, atol=2**-22)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(HEAD_DIM // 2)
    torch.testing.assert_close(sine.double(), sign * expected.sin(), rtol=0, atol=2**-22)


@pytest.mark.parametrize("start", FAR)
def test_what_a_query_makes_of_a_key_depends_on_their_distance_alone(start):
    q, k = torch.randn(2, 1, 50, 1, HEAD_DIM)
    steps = torch.arange(50)

    def scores(first):
        turn = rotation(first + steps, HEAD_DIM, THETA, torch.float32)
        return torch.einsum("bqhd,bkhd->bqk", rotate(q, turn), rotate(k, turn))

    torch.testing.assert_close(scores(start), scores(0), rtol=0, atol=1e-5)
    assert not torch.allclose(scores(start), torch.einsum("bqhd,bkhd->bqk", q, k), atol=0.1)


def test_a_turn_keeps_pairs_of_coordinates_and_their_length():
    x = torch.randn(2, 3, 4, HEAD_DIM, dtype=torch.float64)
    turn = rotation(torch.tensor([0, 1, 77]), HEAD_DIM, THETA, torch.float64)
    turned = rotate(x, turn)
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    pairs, before = (each.unflatten(-1, (2, -1)).square().sum(-2) for each in (turned, x))
    torch.testing.assert_close(pairs, before)
    first = x[0, 1, 0, 0] * math.cos(1) - x[0, 1, 0, HEAD_DIM // 2] * math.sin(1)
    assert turned[0, 1, 0, 0].item() == pytest.approx(first.item(), rel=1e-12)


def test_the_gradient_of_heads_that_are_split_and_turned_is_autograds():
    heads = torch.randn(2, 3, 8, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    turn = rotation(torch.tensor([0, 1, 77]), HEAD_DIM, THETA, torch.float64)
    q_and_k, v = heads.split([6, 2], dim=-2)
    expected = *rotate(q_and_k, turn).split([4, 2], dim=-2), v
    found = split_and_turn(heads, (4, 2, 2), turn)
    weights = [torch.randn_like(part) for part in expected]
    for actual, part in zip(found, expected, strict=True):
        assert torch.equal(actual, part)
    of_found, of_expected = (
        torch.autograd.grad(sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)), heads)
        for parts in (found, expected)
    )
    torch.testing.assert_close(of_found, of_expected)
