"""Attention pooling: gradients of every input, whatever is asked for, whatever the strides, the same bits each time."""

from __future__ import annotations

import pytest
import torch
from attention_pool_problem import (
    BACKENDS,
    DOUBLE_BACKENDS,
    FAST_BACKENDS,
    Problem,
    Sequence,
    assert_problem_within_budget,
    dropout_mask,
    make_sequence,
    make_windows,
)
from torch import Tensor

from smt_kernels import WindowSpec, attention_pool


def small_windows(dtype: torch.dtype, device: str) -> Problem:
    return make_windows(dtype, device, n=8, size=20, n_memory=5, width=16, d_k=12)


def small_sequence(dtype: torch.dtype, device: str) -> Problem:
    return make_sequence(Sequence(settings={"n_writes": 6, "write_group": 2}), dtype, device)


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as is"])
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_gradients_match_finite_differences(backend, normalise, dropout):
    sizes = {"n": 2, "size": 5, "n_memory": 2, "width": 3, "d_k": 2}
    windows = make_windows(torch.float64, "cpu", normalise=normalise, dropout=dropout, **sizes)
    case = Sequence(WindowSpec(2, 3, 2), 1, 9, 3, 3, 2, {"n_writes": 4, "write_group": 2}, dropout, normalise)
    for problem in (windows, make_sequence(case, torch.float64, "cpu")):
        names = list(problem.inputs)

        def call(*values: Tensor, problem=problem, names=names) -> tuple[Tensor, ...]:
            return problem.function(**dict(zip(names, values, strict=True)), **problem.settings, backend=backend)

        assert torch.autograd.gradcheck(call, tuple(value.requires_grad_() for value in problem.inputs.values()))


@pytest.mark.parametrize("used", [(0,), (1,)], ids=["pooled", "weights"])
@pytest.mark.parametrize("make", [small_windows, small_sequence], ids=["windows", "sequence"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradients_are_right_when_only_one_result_is_used(backend, make, used, device):
    assert_problem_within_budget(make(torch.float32, device), backend, used=used)


@pytest.mark.parametrize("make", [small_windows, small_sequence], ids=["windows", "sequence"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_inputs_may_have_any_strides(backend, make, device):
    problem = make(torch.float32, device)
    for name, value in problem.inputs.items():
        problem.inputs[name] = torch.stack([value, torch.full_like(value, float("nan"))], dim=-1)[..., 0]
    assert not any(value.is_contiguous() for value in problem.inputs.values())
    assert_problem_within_budget(problem, backend)
    for name, value in problem.inputs.items():
        problem.inputs[name] = value.transpose(0, 1).contiguous().transpose(0, 1)
    assert_problem_within_budget(problem, backend)


@pytest.mark.parametrize("make", [small_windows, small_sequence], ids=["windows", "sequence"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradients_and_dropout_masks_may_have_any_strides(backend, make, device):
    problem = make(torch.float32, device)
    mask = dropout_mask(*problem.grads[1].shape, device=device)
    problem.settings["dropout_mask"] = torch.stack([mask, torch.full_like(mask, float("nan"))], dim=-1)[..., 0]
    of_weights = torch.cat([problem.grads[1], torch.full_like(problem.grads[1], float("nan"))], dim=-1)
    of_weights = of_weights[..., : problem.grads[1].shape[-1]]
    problem.grads = torch.ones((), device=device).expand(problem.grads[0].shape), of_weights
    assert_problem_within_budget(problem, backend)


@pytest.mark.parametrize("make", [small_windows, small_sequence], ids=["windows", "sequence"])
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_dropout_masks_are_not_differentiated(backend, make):
    problem = make(torch.float32, "cpu")
    mask = dropout_mask(*problem.grads[1].shape).requires_grad_()
    pooled, _ = problem.function(**problem.inputs, **problem.settings, dropout_mask=mask, backend=backend)
    assert not pooled.requires_grad or torch.autograd.grad(pooled.sum(), mask, allow_unused=True) == (None,)


@pytest.mark.parametrize("make", [small_windows, small_sequence], ids=["windows", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, make, device):
    problem = make(torch.bfloat16, device)
    first, second = problem.results(backend), problem.results(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_entries_that_are_alike_leave_gradients_of_the_projections_that_are_not_rounding(backend, device):
    """The gradient of a query is a sum over what tells entries from their average, a tenth of each here."""
    width, n_windows = 128, 2
    entries = torch.randn(width, device=device) + 0.1 * torch.randn(n_windows, 65, width, device=device)
    inputs = entries, 0.04 * torch.randn(width, width, device=device), 0.04 * torch.randn(width, width, device=device)
    inputs, grad = [x.bfloat16() for x in inputs], torch.randn(n_windows, width, device=device).bfloat16()

    def gradients(dtype, backend):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        pooled, _ = attention_pool(*given, n_memory=15, backend=backend)
        return torch.autograd.grad(pooled, given[1:], grad.to(dtype))

    plain, exact = gradients(torch.bfloat16, "reference"), gradients(torch.float64, "reference")
    for found, by_plain, right in zip(gradients(torch.bfloat16, backend), plain, exact, strict=True):
        assert (found.double() - right).norm() <= (by_plain.double() - right).norm()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_where_dropout_leaves_nothing_there_is_no_gradient_however_large_that_of_the_result(backend, device):
    problem = small_windows(torch.float32, device)
    windows = problem.inputs["windows"].requires_grad_()
    mask = torch.ones(windows.shape[:2], device=device)
    mask[::2] = 0.0
    given = {**problem.inputs, **problem.settings, "dropout_mask": mask}
    pooled, _ = problem.function(**given, backend=backend)
    (found,) = torch.autograd.grad((1e8 * pooled * torch.randn_like(pooled)).sum(), windows)
    assert not found[::2].any() and found[1::2].any()


@pytest.mark.parametrize("make", [small_windows, small_sequence], ids=["windows", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropout_mask_has_no_gradient(backend, make, device):
    problem = make(torch.float32, device)
    shape = problem.function(**problem.inputs, **problem.settings)[1].shape
    mask = torch.ones(shape, device=device, requires_grad=True)
    pooled, weights = problem.function(**problem.inputs, **{**problem.settings, "dropout_mask": mask}, backend=backend)
    assert not pooled.requires_grad and not weights.requires_grad
