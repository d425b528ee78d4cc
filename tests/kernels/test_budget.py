"""An error budget fails on every kind of wrong result, and poisoned memory shows what nobody wrote."""

from __future__ import annotations

import pytest
import torch

from smt_kernels.testing.budget import assert_equal_in_double, assert_within_budget, poisoned_memory

EXACT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
PLAIN = EXACT.bfloat16() + torch.tensor([0.0, 0.0, 0.0625], dtype=torch.bfloat16)


def check(actual: torch.Tensor) -> None:
    assert_within_budget({"out": actual}, {"out": EXACT}, {"out": PLAIN})


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


EPS = torch.finfo(torch.float32).eps


def attend(dtype: torch.dtype, n_keys: int, size: float) -> dict[str, torch.Tensor]:
    """Attention of one query, with scores of about ``size`` and both gradients."""
    torch.manual_seed(1)
    q, k, v, grad = torch.randn(4, n_keys, 16).to(dtype).unbind()
    q, v = (q[:1] * size**0.5).requires_grad_(), v.requires_grad_()
    out = torch.softmax(q @ (k * size**0.5).T / 4, dim=-1) @ v
    dq, dv = torch.autograd.grad(out, (q, v), grad[:1])
    return {"out": out.detach(), "dq": dq, "dv": dv}


def off(results: dict[str, torch.Tensor], **errors: float) -> dict[str, torch.Tensor]:
    return {name: value + errors.get(name, 0.0) for name, value in results.items()}


def test_where_plain_pytorch_is_exact_by_luck_the_budget_is_the_rounding_of_the_formula():
    """One key: out is v, and dq is what dP - delta leaves of two equal numbers of the size of a sum over the head."""
    exact, plain = attend(torch.float64, 1, 1.0), attend(torch.float32, 1, 1.0)
    assert not plain["dq"].any() and not exact["dq"].any()
    with pytest.raises(AssertionError, match="over budget: dq"):
        assert_within_budget(off(plain, dq=EPS), exact, plain)
    assert_within_budget(off(plain, dq=EPS, out=2 * EPS), lambda: attend(torch.float64, 1, 1.0), plain)
    for name in ("dq", "out"):
        with pytest.raises(AssertionError, match=f"over budget: {name}"):
            assert_within_budget(off(plain, **{name: 40 * EPS}), lambda: attend(torch.float64, 1, 1.0), plain)


def test_the_rounding_of_the_formula_grows_with_scores_that_cancel_in_its_exponent():
    """An error of |s| roundings in a weight is what exp(s - lse) must make; ten times as much it need not."""
    size = 300.0
    exact, plain = attend(torch.float64, 8, size), attend(torch.float32, 8, size)
    largest = max(exact["out"].abs().max().item(), 1.0)
    for error, within in ((size * EPS / 8 * largest, True), (10 * size * EPS * largest, False)):
        actual = {name: value.float() for name, value in off(exact, out=error).items()}
        if within:
            assert_within_budget(actual, lambda: attend(torch.float64, 8, size), plain)
        else:
            with pytest.raises(AssertionError, match="over budget: out"):
                assert_within_budget(actual, lambda: attend(torch.float64, 8, size), plain)


def test_a_sum_may_lose_a_few_roundings_of_its_terms_and_no_more():
    """A product that cancels: 64 terms, of which little is left."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 64, generator=generator), torch.randn(64, 1, generator=generator)
    b[-1] -= (a @ b)[0, 0] / a[0, -1]
    terms = (a.abs() @ b.abs()).item()

    def product(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"out": a.to(dtype) @ b.to(dtype)}

    exact, plain = product(torch.float64), {"out": product(torch.float64)["out"].float()}  # as lucky as can be
    assert exact["out"].abs() < 1e-5 * terms
    assert_within_budget(off(plain, out=0.5 * EPS * terms), lambda: product(torch.float64), plain)
    with pytest.raises(AssertionError, match="rounding of the formula"):
        assert_within_budget(off(plain, out=3 * EPS * terms), lambda: product(torch.float64), plain)


def test_what_the_formula_does_not_round_may_not_differ():
    x = torch.randn(5)
    copies = {"out": torch.cat([x[2:], -x[:2]])}
    with pytest.raises(AssertionError, match="rounding of the formula 0"):
        assert_within_budget(off(copies, out=1e-3), lambda: {"out": torch.cat([x.double()[2:], -x.double()[:2]])}, copies)


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
