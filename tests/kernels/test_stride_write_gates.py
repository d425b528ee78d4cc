"""Gated SSM writes: what the gate guards is kept bit for bit, what it hides has no influence, and pieces make a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from stride_write_problem import BACKENDS, DTYPES, FAST_BACKENDS, INPUTS, Case, Problem, dtype_id, make_problem
from torch import Tensor

from smt_kernels import stride_write
from smt_kernels.testing.budget import assert_equal_in_double, assert_within_budget


@pytest.mark.parametrize("gate", ["random", "all off"])
@pytest.mark.parametrize("writes", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_where_the_gate_is_off_has_no_influence(backend, writes, gate, device):
    problem = make_problem(Case(3, writes), torch.float32, device, gate)
    problem.gate[0] = False
    before = problem.results(backend)
    for value in (problem.inputs["x"], problem.inputs["z"], problem.grads[0]):
        value[~problem.gate] = float("nan")
    after = problem.results(backend)
    for name in before:
        assert torch.equal(before[name], after[name]), name
    for name in ("y", "d_x", "d_z"):
        assert not after[name][~problem.gate].any(), name


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_rows_may_make_fewer_writes_than_a_convolution_has_taps(backend, device):
    problem = make_problem(Case(4, 3, 64, 16, 4, 4), precision_of(backend), device, "all on")
    problem.gate[:] = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]], dtype=torch.bool)
    exact = functools.partial(problem.results, "reference", torch.float64)
    assert_equal_to(exact, problem.results(backend), problem, problem.results("reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("writes", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_all_gates_off_keeps_its_states_bit_for_bit(backend, writes, dtype, device):
    problem = make_problem(Case(3, writes), dtype, device, "all on")
    problem.gate[1] = False
    for name in ("conv_state", "ssm_state"):
        problem.inputs[name][:, 0, 0] = -0.0
    results = problem.results(backend)
    for name, grad in zip(("conv_state", "ssm_state"), problem.grads[1:], strict=True):
        kept, new = problem.inputs[name], results[f"new_{name}"]
        assert torch.equal(kept[1], new[1]) and torch.equal(kept[1].signbit(), new[1].signbit())
        assert not torch.equal(kept[0], new[0]) and not torch.equal(kept[2], new[2])
        assert torch.equal(results[f"d_{name}"][1], grad[1])


def assert_equal_to(
    exact: Callable[[], dict[str, Tensor]], actual: dict[str, Tensor], problem: Problem, plain: dict[str, Tensor]
) -> None:
    """Equal but for the order of sums in float64, within the error budget in float32, which is all that kernels take."""
    if problem.inputs["x"].dtype == torch.float64:
        _, writes, width = problem.inputs["x"].shape
        assert_equal_in_double(actual, exact(), terms=writes * (width + problem.inputs["a"].shape[1]))
    else:
        assert_within_budget(actual, exact, plain)


def precision_of(backend: str) -> torch.dtype:
    return torch.float32 if backend == "triton" else torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_writes_equal_the_writes_of_each_row_alone(backend, device):
    problem = make_problem(Case(2, 5, 64, 16, 4, 4), precision_of(backend), device, "random")

    def alone(row: int, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        on = problem.gate[row]
        inputs = {n: (v[row : row + 1] if n in INPUTS[:4] else v).to(dtype) for n, v in problem.inputs.items()}
        inputs |= {name: inputs[name][:, on] for name in ("x", "z")}
        y, conv_state, ssm_state = stride_write(**inputs, backend=backend)
        return {"y": y[0], "conv": conv_state[0], "ssm": ssm_state[0]}

    gated = stride_write(**problem.inputs, gate=problem.gate, backend=backend)
    for row in range(2):
        if problem.gate[row].any():
            actual = {"y": gated[0][row, problem.gate[row]], "conv": gated[1][row], "ssm": gated[2][row]}
            plain = alone(row, "reference", problem.inputs["x"].dtype)
            assert_equal_to(functools.partial(alone, row, "reference", torch.float64), actual, problem, plain)


@pytest.mark.parametrize("gate", ["none", "random"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_call_equals_calls_in_pieces_with_carried_states(backend, gate, device):
    problem = make_problem(Case(1, 9, 64, 16, 4, 4), precision_of(backend), device, gate)
    exact, plain = functools.partial(problem.results, "reference", torch.float64), problem.results("reference")
    inputs = {name: value.detach().requires_grad_() for name, value in problem.inputs.items()}
    states, outputs = {name: inputs[name] for name in ("conv_state", "ssm_state")}, []
    for start, stop in ((0, 1), (1, 3), (3, 9)):
        piece = inputs | states | {name: inputs[name][:, start:stop] for name in ("x", "z")}
        y, *new = stride_write(**piece, gate=None if gate == "none" else problem.gate[:, start:stop], backend=backend)
        states = dict(zip(states, new, strict=True))
        outputs.append(y)
    results = torch.cat(outputs, dim=1), *states.values()
    pieces = dict(zip(plain, [*results, *torch.autograd.grad(results, list(inputs.values()), problem.grads)], strict=True))
    assert_equal_to(exact, pieces, problem, plain)
