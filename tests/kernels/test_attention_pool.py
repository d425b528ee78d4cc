"""Attention pooling of windows: every backend computes the definition, forward and backward, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from attention_pool_problem import (
    BACKENDS,
    DOUBLE_BACKENDS,
    DTYPES,
    FAST_BACKENDS,
    assert_problem_within_budget,
    dtype_id,
    make_windows,
    outputs_of,
    windows_by_hand,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import in_turn

from smt_kernels.testing.budget import assert_equal_in_double


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as is"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_windows_follow_the_formula_computed_one_number_at_a_time(backend, ragged, normalise, dropout):
    sizes = {"n": 3, "size": 9, "n_memory": 4, "width": 5, "d_k": 3}
    problem = make_windows(torch.float64, "cpu", ragged=ragged, normalise=normalise, dropout=dropout, **sizes)
    assert_equal_in_double(outputs_of(problem.results(backend)), windows_by_hand(problem), terms=9 * 5)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    in_turn(
        [{}, {"normalise": False}, {"dropout": True}, {"ragged": False}, {"n_memory": 0, "size": 50}, {"n_memory": 64}],
        DTYPES,
        dtype_id,
        native=(0, 1, 2),
    ),
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_windows_err_at_most_twice_as_much_as_plain_pytorch(backend, sizes, dtype, device):
    assert_problem_within_budget(make_windows(dtype, device, n=2, **sizes), backend)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3),
    size=st.integers(1, 80),
    n_memory=st.integers(0, 79),
    width=st.sampled_from([7, 64]),  # a kernel of its own for each
    d_k=st.integers(1, 40),
    ragged=st.booleans(),
    normalise=st.booleans(),
    dropout=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_any_shape_is_within_budget(backend, n, size, n_memory, width, d_k, ragged, normalise, dropout, dtype, device):
    sizes = {"n": n, "size": size, "n_memory": min(n_memory, size - 1), "width": width, "d_k": d_k}
    torch.manual_seed(size)
    problem = make_windows(dtype, device, ragged=ragged, normalise=normalise, dropout=dropout, **sizes)
    assert_problem_within_budget(problem, backend)


@pytest.mark.triton
@pytest.mark.parametrize(("width", "dtype"), [(300, torch.float32), (1100, torch.bfloat16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as is"])
def test_entries_wider_than_a_program_are_within_budget(normalise, width, dtype, device):
    problem = make_windows(dtype, device, n=2, size=20, n_memory=6, width=width, normalise=normalise, dropout=True)
    assert_problem_within_budget(problem, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_do_not_exist_change_nothing_whatever_they_hold(backend, device):
    problem = make_windows(torch.float32, device)
    problem.settings["valid_memory"][:], problem.settings["valid_tokens"][:] = 4, 30
    before = problem.results(backend)
    absent = torch.ones(65, dtype=torch.bool, device=device)
    absent[15 - 4 : 15] = absent[65 - 30 :] = False
    problem.inputs["windows"][:, absent] = float("nan")
    after = problem.results(backend)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not after["weights"][:, absent].any() and not after["d_windows"][:, absent].any()
    torch.testing.assert_close(after["weights"].sum(dim=1), torch.ones(6, device=device))
