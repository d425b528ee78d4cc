"""Window attention: every backend computes the definition, forward and backward, whatever the shape, or says why not."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import in_turn
from torch import Tensor
from window_attention_problem import (
    BACKENDS,
    CASES,
    DTYPES,
    FAST_BACKENDS,
    Case,
    Problem,
    assert_problem_within_budget,
    dtype_id,
    make_problem,
)

from smt_kernels import launch, window_attention
from smt_kernels.testing.budget import assert_equal_in_double, assert_within_budget, poisoned_memory


# The window of the model, Case(65), in every dtype.
@pytest.mark.parametrize(("case", "dtype"), in_turn([CASES[6], *CASES[:6], *CASES[7:]], DTYPES, dtype_id, native=(0, 8)))
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_output_and_gradients_err_at_most_twice_as_much_as_plain_pytorch(backend, case, dtype, device):
    assert_problem_within_budget(make_problem(case, dtype, device), backend)


@pytest.mark.triton
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case", [Case(65, kv_heads=1, head_dim=32, n_windows=1), Case(80, tail=66, heads=1, kv_heads=1, n_windows=1)], ids=str
)
@pytest.mark.parametrize(("family", "dtype"), in_turn(launch.FAMILIES[:-1], [torch.float32, torch.bfloat16], dtype_id))
def test_the_launch_settings_of_every_architecture_compute_the_same(family, dtype, case, monkeypatch):
    monkeypatch.setattr(launch, "architecture_family", lambda device: family)
    assert_problem_within_budget(make_problem(case, dtype, "cpu"), "triton")


def by_hand(problem: Problem, scale: float) -> Tensor:
    """The definition with Python numbers, one query at a time: no tensor operation and no WindowSpec."""
    q, k, v = (x.tolist() for x in (problem.q, problem.k, problem.v))
    n_windows, window, heads, _ = problem.q.shape
    out = torch.zeros(problem.q.shape, dtype=torch.float64)
    for n, i, h in itertools.product(range(n_windows), range(window), range(heads)):
        kv_head = h // (heads // problem.k.shape[2])
        slots, tokens = int(problem.valid_memory[n]), int(problem.valid_tokens[n])
        there = [*range(problem.n_memory - slots, problem.n_memory), *range(window - tokens, window)]
        seen = [j for j in there if j <= i]
        exps = [math.exp(scale * sum(a * b for a, b in zip(q[n][i][h], k[n][j][kv_head], strict=True))) for j in seen]
        for j, value in zip(seen, exps, strict=True):
            out[n, i, h] += value / sum(exps) * torch.tensor(v[n][j][kv_head], dtype=torch.float64)
    return out


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_it_computes_the_definition(backend, scale):
    problem = make_problem(Case(7, heads=4, kv_heads=2, head_dim=3, n_memory=3, n_windows=3), torch.float64, "cpu")
    out = window_attention(problem.q, problem.k, problem.v, scale=scale, backend=backend, **problem.options())
    assert_equal_in_double({"out": out}, {"out": by_hand(problem, scale or 3**-0.5)}, terms=10)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_windows_without_counts_are_full(backend, device):
    assert_problem_within_budget(make_problem(Case(), torch.float32, device, ragged=False), backend)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    window=st.integers(1, 128),
    tail=st.none() | st.integers(1, 128),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    head_dim=st.sampled_from([5, 64]),  # a kernel of its own for each
    n_memory=st.integers(0, 128),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_any_shape_is_within_budget(backend, window, tail, kv_heads, group, head_dim, n_memory, dtype, device):
    tail = tail and min(tail, window)
    case = Case(window, tail, kv_heads * group, kv_heads, head_dim, n_memory, n_windows=1)
    torch.manual_seed(window)
    assert_problem_within_budget(make_problem(case, dtype, device), backend)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    n_windows, window, heads, head_dim = x.shape
    if layout == "fused projection":
        return torch.cat([x.new_full(x.shape, float("nan")), x], dim=2)[:, :, heads:]
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "windows second":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided head":
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]
    assert layout == "overlapping windows"
    stream = torch.randn(window + 16 * n_windows, heads, head_dim, device=x.device).to(x.dtype)
    return stream.unfold(0, window, 16).permute(0, 3, 1, 2)[:n_windows]


@pytest.mark.parametrize("layout", ["fused projection", "heads first", "windows second", "strided head", "overlapping windows"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_inputs_may_have_any_strides(backend, layout, device):
    problem = make_problem(Case(head_dim=16), torch.float32, device)
    problem = replace(problem, **{name: in_layout(getattr(problem, name), layout) for name in ("q", "k", "v", "grad")})
    assert not problem.q.is_contiguous()
    assert_problem_within_budget(problem, backend)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_every_input_may_have_strides_of_its_own(backend, device):
    problem = make_problem(Case(66, head_dim=16), torch.float32, device, ragged=False)
    layouts = {"k": "heads first", "v": "fused projection", "grad": "windows second"}
    problem = replace(problem, **{name: in_layout(getattr(problem, name), layout) for name, layout in layouts.items()})
    assert len({x.stride()[:3] for x in (problem.q, problem.k, problem.v, problem.grad)}) == 4
    assert_problem_within_budget(problem, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_equals_the_end_of_the_whole_window(backend, device):
    problem = make_problem(Case(), torch.float32, device)
    whole = window_attention(problem.q, problem.k, problem.v, backend=backend, **problem.options())
    for tail in (1, 16, 64, 65):
        options = problem.options() | {"tail": tail}
        from_all = window_attention(problem.q, problem.k, problem.v, backend=backend, **options)
        from_last = window_attention(problem.q[:, -tail:], problem.k, problem.v, backend=backend, **options)
        assert torch.equal(from_all, from_last)
        torch.testing.assert_close(from_all, whole[:, -tail:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_see_nothing_give_zeros_and_no_gradient(backend, device):
    problem = make_problem(Case(), torch.float32, device)
    problem = replace(problem, valid_memory=torch.zeros_like(problem.valid_memory), valid_tokens=problem.valid_tokens * 0)
    with poisoned_memory():
        for name, value in problem.results(backend).items():
            assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("anything", [1e3, float("nan")], ids=["1000", "nan"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_do_not_exist_change_nothing(backend, anything, device):
    problem = make_problem(Case(), torch.float32, device)
    problem.valid_memory[:], problem.valid_tokens[:] = 4, 30
    before = problem.results(backend)
    absent = torch.ones(65, dtype=torch.bool, device=device)
    absent[15 - 4 : 15] = absent[65 - 30 :] = False
    for x in (problem.k, problem.v):
        x[:, absent] = anything
    after = problem.results(backend)
    for name in before:
        assert torch.equal(before[name][:, ~absent], after[name][:, ~absent]), name
    assert not after["dk"][:, absent].any() and not after["dv"][:, absent].any()


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_scale_may_be_any_number(backend, scale, device):
    problem = make_problem(Case(20, head_dim=16, n_memory=5), torch.float64 if backend == "blocked" else torch.float32, device)
    inputs = problem.q, problem.k, problem.v

    def results(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        converted = [x.to(dtype) for x in inputs]
        return {"out": window_attention(*converted, scale=scale, backend=backend, **problem.options())}

    actual, plain = (results(name, problem.q.dtype) for name in (backend, "reference"))
    if backend == "blocked":
        assert_equal_in_double(actual, plain, terms=20)
    else:
        assert_within_budget(actual, lambda: results("reference", torch.float64), plain)


@pytest.mark.parametrize("case", [Case(1, head_dim=3), Case(65, heads=4), Case(66, tail=16, kv_heads=1)], ids=str)
def test_blocked_equals_the_reference_in_double_precision(case, device):
    problem = make_problem(case, torch.float64, device)
    terms = case.window + case.head_dim
    assert_equal_in_double(problem.results("blocked"), problem.results("reference"), terms=terms)


@pytest.mark.parametrize("tail", [None, 2], ids=["whole", "tail"])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradients_match_finite_differences(backend, tail):
    problem = make_problem(Case(4, tail, heads=2, kv_heads=1, head_dim=2, n_memory=2), torch.float64, "cpu")
    inputs = tuple(x.requires_grad_() for x in (problem.q, problem.k, problem.v))
    assert torch.autograd.gradcheck(lambda q, k, v: window_attention(q, k, v, backend=backend, **problem.options()), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, device):
    problem = make_problem(Case(heads=4), torch.bfloat16, device)
    first, second = problem.results(backend), problem.results(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_counts_may_have_any_strides(backend, device):
    problem = make_problem(Case(65, n_windows=3), torch.float32, device, ragged=False)
    counts = torch.tensor([[4, 99], [2, 99], [3, 99]], dtype=torch.int32, device=device)
    for valid in (counts[:, 0], counts[:1, 0].expand(3)):
        given = {"n_memory": 15, "valid_memory": valid, "valid_tokens": valid, "backend": backend}
        packed = {"valid_memory": valid.clone(), "valid_tokens": valid.clone()}
        inputs = problem.q, problem.k, problem.v
        assert torch.equal(window_attention(*inputs, **given), window_attention(*inputs, **given | packed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_that_nobody_has_checked_and_are_too_large_count_as_all(backend, device, monkeypatch):
    monkeypatch.setattr("smt_kernels.checks.readable", lambda tensor: False)  # as on a GPU
    problem = make_problem(Case(20, n_windows=3), torch.float32, device, ragged=False)
    inputs = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]

    def results(memory: list[int], tokens: list[int]) -> list[Tensor]:
        counts = (torch.tensor(values, dtype=torch.int32, device=device) for values in (memory, tokens))
        given = dict(zip(("valid_memory", "valid_tokens"), counts, strict=True))
        out = window_attention(*inputs, n_memory=8, **given, backend=backend)
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    for found, expected in zip(results([3, 9, 40], [5, 99, 13]), results([3, 8, 8], [5, 12, 12]), strict=True):
        assert torch.equal(found, expected)
