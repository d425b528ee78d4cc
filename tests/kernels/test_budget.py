"""An error budget fails on every kind of wrong result, and poisoned memory shows what nobody wrote."""

from __future__ import annotations

import pytest
import torch

from smt_kernels.testing.budget import assert_equal_in_double, assert_within_budget, poisoned_memory

EXACT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
PLAIN = EXACT.bfloat16() + torch.tensor([0.0, 0.0, 0.0625], dtype=torch.bfloat16)


def check(actual: torch.Tensor, **named: object) -> None:
    assert_within_budget({"out": actual}, {"out": EXACT}, {"out": PLAIN}, **named)


def test_twice_the_error_of_plain_pytorch_is_within_budget():
    check(EXACT.bfloat16())
    check((EXACT + torch.tensor([0.125, 0.0, 0.0])).bfloat16())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (EXACT.bfloat16() * 1.1, "over budget: out"),
        (torch.tensor([1.0, float("nan"), 3.0], dtype=torch.bfloat16), "error inf"),
        (torch.tensor([1.0, -float("inf"), 3.0], dtype=torch.bfloat16), "error inf"),
        (EXACT.float(), "out has dtype torch.float32, expected torch.bfloat16"),
        (EXACT.bfloat16()[:2], "out has shape"),
    ],
    ids=["inaccurate", "nan", "infinite", "dtype", "shape"],
)
def test_a_wrong_result_is_over_budget(wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong)


def test_the_floor_is_one_rounding_of_the_stated_magnitude():
    exact = {"out": torch.zeros(2, dtype=torch.float64)}
    plain = {"out": torch.zeros(2)}
    slightly_off = {"out": torch.tensor([0.0, 1e-7])}
    with pytest.raises(AssertionError, match="over budget"):
        assert_within_budget(slightly_off, exact, plain)
    assert_within_budget(slightly_off, exact, plain, magnitude={"out": 1.0})


def test_infinities_that_agree_are_no_error():
    exact = {"lse": torch.tensor([-float("inf"), 1.0], dtype=torch.float64)}
    single = {"lse": exact["lse"].float()}
    assert_within_budget(single, exact, single)


def test_a_missing_result_is_an_error():
    with pytest.raises(AssertionError, match="results differ"):
        assert_within_budget({}, {"out": EXACT}, {"out": PLAIN})


def test_the_exact_result_must_be_double():
    with pytest.raises(TypeError, match=r"must be float64, got torch\.float32"):
        assert_within_budget({"out": PLAIN}, {"out": EXACT.float()}, {"out": PLAIN})


def test_double_results_may_differ_by_the_order_of_their_sums_only():
    terms = torch.randn(1000, dtype=torch.float64)
    exact = {"sum": terms.sum(0, keepdim=True)}
    assert_equal_in_double({"sum": terms.flip(0).cumsum(0)[-1:]}, exact, terms=1000)
    with pytest.raises(AssertionError, match="sum: error"):
        assert_equal_in_double({"sum": exact["sum"] + 1e-8}, exact, terms=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_poisoned_memory_is_nan_until_written(dtype, device):
    like = torch.zeros(64, dtype=dtype, device=device)
    allocations = [
        lambda: torch.empty(64, dtype=dtype, device=device),
        lambda: torch.empty_like(like),
        lambda: like.new_empty(64),
    ]
    for allocate in allocations:
        with poisoned_memory():
            assert allocate().isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
