"""Attention pooling of sequences: every backend computes the definition, forward and backward, wherever the writes lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_pool_problem import (
    BACKENDS,
    DOUBLE_BACKENDS,
    DTYPES,
    FAST_BACKENDS,
    SEQUENCES,
    WIDE_SEQUENCES,
    Sequence,
    assert_problem_within_budget,
    dtype_id,
    make_sequence,
    outputs_of,
    sequence_as_windows,
    sequence_by_hand,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import in_turn

from smt_kernels import WindowSpec, attention_pool, attention_pool_sequence
from smt_kernels.attention_pool import blocked
from smt_kernels.testing.budget import assert_equal_in_double


@pytest.mark.parametrize("case", SEQUENCES, ids=str)
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_sequences_follow_the_formula_computed_one_number_at_a_time(backend, case):
    problem = make_sequence(case, torch.float64, "cpu")
    assert_equal_in_double(outputs_of(problem.results(backend)), sequence_by_hand(problem), terms=10 * 6)


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as is"])
@pytest.mark.parametrize("slots", [25, None], ids=["with slots", "tokens only"])
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_sequences_follow_the_formula_with_every_switch(backend, slots, normalise, dropout):
    case = Sequence(slots=slots, settings={"n_writes": 6, "write_group": 4}, normalise=normalise, dropout=dropout)
    problem = make_sequence(case, torch.float64, "cpu")
    assert_equal_in_double(outputs_of(problem.results(backend)), sequence_by_hand(problem), terms=10 * 6)


@pytest.mark.parametrize("case", SEQUENCES, ids=str)
def test_gradients_of_sequences_equal_those_of_the_reference_in_double_precision(case, device):
    problem = make_sequence(replace(case, dropout=True), torch.float64, device)
    assert_equal_in_double(problem.results("blocked"), problem.results("reference"), terms=20 * 6)


# Timelines take turns: every other one has slots.
@pytest.mark.triton
@pytest.mark.parametrize("case", [*SEQUENCES[:-2:4], *SEQUENCES[3:-2:4], *SEQUENCES[-2:]], ids=str)
def test_every_timeline_errs_at_most_twice_as_much_as_plain_pytorch(case, device):
    assert_problem_within_budget(make_sequence(replace(case, dropout=True), torch.float32, device), "triton")


# The first window lacks entries, the last strip is cut, and a slot between the groups of a strip is pooled by none.
@pytest.mark.triton
@pytest.mark.parametrize(("windows", "n_writes", "slots"), [(1, 3, 9), (2, 5, 9), (2, 3, None), (16, 17, 20)])
def test_any_number_of_windows_may_share_a_program(windows, n_writes, slots, monkeypatch, device):
    from smt_kernels.attention_pool import kernels

    monkeypatch.setattr(kernels, "windows_of_strip", lambda *_: windows)
    timeline = {"first_write": 5, "n_writes": n_writes, "write_group": 4, "first_step": 20, "first_slot": 2}
    case = Sequence(settings=timeline, tokens=4 * n_writes + 3, slots=slots, dropout=True)
    problem = make_sequence(case, torch.float32, device)
    if slots is not None:
        problem.inputs["slots"][:, 4 - 2] = float("nan")
    assert_problem_within_budget(problem, "triton")


@pytest.mark.triton(launches=False)
def test_few_windows_are_spread_over_many_programs():
    from smt_kernels.attention_pool import kernels

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    sizes = [(1, 1), (8, 8), (32, 8), (1, 600), (8, 255), (8, 256), (3, 1000), (64, 256)]
    assert [kernels.windows_of_strip(*size, gpu) for size in sizes] == [1, 1, 2, 4, 8, 16, 16, 16]
    for n_rows, n_windows in sizes:
        programs = n_rows * -(-n_windows // kernels.windows_of_strip(n_rows, n_windows, gpu))
        assert programs >= min(kernels.PROGRAMS, n_rows * n_windows)
    assert kernels.windows_of_strip(1, 1, cpu) == kernels.WINDOWS


@pytest.mark.parametrize("writes", [1, 3, 16])
def test_any_number_of_writes_may_share_a_product(writes, monkeypatch, device):
    monkeypatch.setattr(blocked, "WRITES_PER_PRODUCT", writes)
    problem = make_sequence(Sequence(settings={"n_writes": 9, "write_group": 4}), torch.float64, device)
    assert_equal_in_double(problem.results("blocked"), problem.results("reference"), terms=20 * 6)


@pytest.mark.parametrize("case", SEQUENCES[:12], ids=str)
@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_a_sequence_equals_its_windows_cut_out(backend, case):
    problem = make_sequence(case, torch.float64, "cpu")
    pooled, weights = attention_pool_sequence(**problem.inputs, **problem.settings, backend=backend)
    n_memory, compared = 0 if case.slots is None else case.window.n_memory, 0
    w_q, w_k = problem.inputs["w_q"], problem.inputs["w_k"]
    for write, (windows, there) in enumerate(sequence_as_windows(problem)):
        if not bool((there[:n_memory].diff() >= 0).all()) or not bool((there[n_memory:].diff() >= 0).all()):
            continue  # entries missing at the right of a half: only sequences can say that
        compared += 1
        valid = [part.sum().to(torch.int32).expand(case.batch).contiguous() for part in (there[:n_memory], there[n_memory:])]
        counts = dict(zip(("valid_memory", "valid_tokens"), valid, strict=True))
        one = attention_pool(windows, w_q, w_k, n_memory=n_memory, **counts, backend=backend)
        actual = {"pooled": pooled[:, write], "weights": weights[:, write]}
        assert_equal_in_double(actual, dict(zip(actual, one, strict=True)), terms=10 * 6)
    assert compared


@pytest.mark.parametrize(("case", "dtype"), in_turn(WIDE_SEQUENCES, DTYPES, dtype_id, native=(0, 1)))
@pytest.mark.parametrize(("normalise", "dropout"), [(True, True), (False, False)], ids=["normalised, dropout", "as is"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_sequences_err_at_most_twice_as_much_as_plain_pytorch(backend, normalise, dropout, case, dtype, device):
    assert_problem_within_budget(make_sequence(replace(case, dropout=dropout, normalise=normalise), dtype, device), backend)


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    """Sequences of any size in which the tokens reach from the first write to the last, and little else is certain."""
    n_tokens, n_writes = draw(st.integers(1, 40)), draw(st.integers(1, 18))
    window = WindowSpec(draw(st.integers(0, 20)), n_tokens, draw(st.integers(1, n_tokens)))
    first_write = draw(st.integers(0, 10))
    before, after = draw(st.integers(0, 50)), draw(st.integers(1, 20))
    first_step = window.write_step(first_write) - before
    timeline = {"first_write": first_write, "n_writes": n_writes, "write_group": draw(st.integers(1, 10))}
    timeline |= {"first_step": first_step, "first_slot": draw(st.integers(-10, 10))}
    tokens = before + window.stride * (n_writes - 1) + after
    slots = draw(st.none() | st.integers(0, 30))
    width = draw(st.sampled_from([5, 40]))  # a kernel of its own for each
    sizes = draw(st.integers(1, 2)), tokens, slots, width, draw(st.integers(1, 20))
    return Sequence(window, *sizes, timeline, dropout=draw(st.booleans()), normalise=draw(st.booleans()))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(case=sequences(), dtype=st.sampled_from(DTYPES))
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_any_sequence_is_within_budget(backend, case, dtype, device):
    torch.manual_seed(case.tokens)
    assert_problem_within_budget(make_sequence(case, dtype, device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_and_slots_that_no_write_pools_change_nothing(backend, device):
    case = Sequence(settings={"first_write": 8, "n_writes": 4, "write_group": 4, "first_slot": 2}, tokens=90)
    problem = make_sequence(case, torch.float32, device)
    before = problem.results(backend)
    pooled = {"tokens": range(4 * 9 - 6, 4 * 12 + 1), "slots": range(8 - 3 - 2, 8 - 2)}
    for name, used in pooled.items():
        absent = torch.ones(problem.inputs[name].shape[1], dtype=torch.bool)
        absent[list(used)] = False
        problem.inputs[name][:, absent] = float("nan")
        assert not before[f"d_{name}"][:, absent].any() and before[f"d_{name}"][:, ~absent].all()
    after = problem.results(backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_results_do_not_depend_on_inference_mode_or_on_earlier_calls():
    problem = make_sequence(Sequence(settings={"first_write": 7, "n_writes": 3}), torch.float64, torch.device("cpu"))
    blocked.layout_of.cache_clear()
    with torch.inference_mode():
        pooled, weights = attention_pool_sequence(**problem.inputs, **problem.settings)
    later = problem.results("blocked")
    assert torch.equal(pooled, later["pooled"]) and torch.equal(weights, later["weights"])
    assert blocked.layout_of.cache_info().hits > 0


def test_layouts_repeat_from_group_to_group():
    blocked.layout_of.cache_clear()
    problem = make_sequence(Sequence(settings={"n_writes": 4, "write_group": 4}), torch.float32, torch.device("cpu"))
    for group in range(2, 10):
        timeline = {"first_write": 4 * group, "first_step": 16 * group - 30, "first_slot": 4 * group - 20}
        attention_pool_sequence(**problem.inputs, **problem.settings | timeline, backend="blocked")
    assert blocked.layout_of.cache_info().misses == 1
