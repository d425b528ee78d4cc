"""The stride-gated SSM write: every backend computes the definition, forward and backward, and keeps what the gate guards."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import in_turn
from stride_write_problem import (
    BACKENDS,
    DTYPES,
    FAST_BACKENDS,
    GATES,
    INPUTS,
    SMALL_CASES,
    WEIGHTS,
    WIDE_CASES,
    Case,
    assert_problem_within_budget,
    dtype_id,
    make_problem,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from smt_kernels import launch, stride_write
from smt_kernels.stride_write import blocked
from smt_kernels.testing.budget import assert_equal_in_double, assert_within_budget


def silu(value: float) -> float:
    return value / (1 + math.exp(-value))


def brute_force(inputs: dict[str, Tensor], gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of ``docs/kernels/stride_write.md`` and of Mamba's algorithm 2, one number at a time, in Python's floats."""
    conv_w, conv_b, w_x, w_dt, b_dt, a, d = (inputs[name].tolist() for name in WEIGHTS)
    width, n_state, rank, taps = len(a), len(a[0]), len(w_dt[0]), len(conv_w[0])
    all_y, all_conv, all_ssm = [], [], []
    for row in range(len(inputs["x"])):
        history = [list(channel) for channel in inputs["conv_state"][row].tolist()]
        h = inputs["ssm_state"][row].tolist()
        ys = []
        for step, (x, z) in enumerate(zip(inputs["x"][row].tolist(), inputs["z"][row].tolist(), strict=True)):
            if gate is not None and not gate[row, step]:
                ys.append([0.0] * width)
                continue
            u = []
            for e in range(width):
                seen = history[e] + [x[e]]
                u.append(silu(sum(conv_w[e][tap] * seen[tap] for tap in range(taps)) + conv_b[e]))
                history[e] = seen[1:]
            projected = [sum(w * value for w, value in zip(line, u, strict=True)) for line in w_x]
            low, b, c = projected[:rank], projected[rank : rank + n_state], projected[rank + n_state :]
            y = []
            for e in range(width):
                dt = math.log1p(math.exp(sum(w * value for w, value in zip(w_dt[e], low, strict=True)) + b_dt[e]))
                h[e] = [math.exp(dt * a[e][n]) * h[e][n] + dt * b[n] * u[e] for n in range(n_state)]
                y.append((sum(c[n] * h[e][n] for n in range(n_state)) + d[e] * u[e]) * silu(z[e]))
            ys.append(y)
        all_y.append(ys)
        all_conv.append(history)
        all_ssm.append(h)
    y, conv, ssm = (torch.tensor(part, dtype=torch.float64) for part in (all_y, all_conv, all_ssm))
    return y, conv.reshape(inputs["conv_state"].shape), ssm


@pytest.mark.parametrize(("case", "gate"), in_turn(SMALL_CASES, GATES))
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_the_formulas_of_the_design_computed_one_number_at_a_time(backend, case, gate):
    problem = make_problem(case, torch.float64, "cpu", gate)
    names = ("y", "new_conv_state", "new_ssm_state")
    expected = dict(zip(names, brute_force(problem.inputs, problem.gate), strict=True))
    actual = dict(zip(names, stride_write(**problem.inputs, gate=problem.gate, backend=backend), strict=True))
    assert_equal_in_double(actual, expected, terms=case.writes * (case.width + case.state))


@pytest.mark.parametrize("gate", ["none", "random"])
@pytest.mark.parametrize(("case", "dtype"), in_turn(WIDE_CASES, DTYPES, dtype_id, native=(0, 1)))
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_results_and_gradients_err_at_most_twice_as_much_as_plain_pytorch(backend, case, gate, dtype, device):
    assert_problem_within_budget(make_problem(case, dtype, device, gate), backend)


@pytest.mark.triton
@pytest.mark.interpreter
@pytest.mark.parametrize(("programs", "backward"), [(512, 5), (0, 3)], ids=["few rows", "many rows"])
def test_the_blocks_of_a_gpu_compute_the_same(programs, backward, monkeypatch):
    """Many small blocks, whose partial sums are added up; the interpreter's own are large."""
    from smt_kernels.stride_write import blocks, fold

    sums = []
    for kernel in ("scan", "scan_backward"):
        monkeypatch.setitem(blocks._GPU, kernel, dataclasses.replace(blocks._GPU[kernel], programs=programs))
    monkeypatch.setattr(launch, "architecture_family", lambda device: "hopper")
    monkeypatch.setattr(fold, "launch", lambda *args, **named: sums.append(named["PARTIALS"]) or launch.launch(*args, **named))
    assert_problem_within_budget(make_problem(Case(2, 9, 80, 16, 4, 4), torch.float32, "cpu", "random"), "triton")
    assert sums == [3, backward], "blocks of 32 channels forward; backward too, but of 16 where programs would be few"


@pytest.mark.triton
@pytest.mark.interpreter
def test_there_may_be_more_chunks_than_are_loaded_at_once(monkeypatch):
    """Three chunks, the last one of one write, of which two are carried at a time."""
    from smt_kernels.stride_write import blocks

    monkeypatch.setattr(blocks, "_INTERPRETER", dataclasses.replace(blocks._INTERPRETER, steps=2))
    assert_problem_within_budget(make_problem(Case(1, 65, 16, 4, 2, 2), torch.float16, "cpu", "random"), "triton")


@pytest.mark.triton
@pytest.mark.interpreter
def test_the_softplus_of_kernels_errs_by_its_roundings_however_small_it_is():
    """Of exp, sum, quotient, two steps of the polynomial, product and sum: seven halves of a unit in the last place."""
    import toy_kernels

    x = torch.cat([torch.linspace(-80, 80, 3840), torch.linspace(-1, 1, 256)])
    out = torch.empty_like(x)
    launch.launch(toy_kernels.softplus_of, (1,), x.device, x=x, out=out, N=len(x))
    exact = torch.log1p(torch.exp(x.double()))
    assert ((out - exact).abs() <= 3.5 * torch.finfo(torch.float32).eps * exact).all()


@pytest.mark.triton
@pytest.mark.parametrize("count", [1, 5, 70])
def test_partial_sums_are_added_up_however_many(count, device):
    from smt_kernels.stride_write.fold import fold

    partials = torch.rand(count, 3, 47, device=device)
    total = torch.empty(3, 47, device=device)
    fold(partials, total)
    torch.testing.assert_close(total, partials.sum(0))


# In half precision the roundings of inputs and results stand far above those of an order of summation, even in small sizes.
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    writes=st.integers(1, 9),
    width=st.integers(33, 100),
    state=st.sampled_from([3, 16]),  # a kernel of its own for each
    taps=st.sampled_from([1, 5]),
    rank=st.integers(1, 9),
    gate=st.sampled_from(["none", "random"]),
    dtype=st.sampled_from(DTYPES[1:]),
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_any_shape_is_within_budget(backend, batch, writes, width, state, taps, rank, gate, dtype, device):
    torch.manual_seed(width)
    assert_problem_within_budget(make_problem(Case(batch, writes, width, state, taps, rank), dtype, device, gate), backend)


@pytest.mark.triton
@pytest.mark.interpreter
@pytest.mark.parametrize("writes", [1, 3])
def test_the_launch_settings_of_a_gpu_compute_the_same(writes, monkeypatch):
    monkeypatch.setattr(launch, "architecture_family", lambda device: "hopper")
    case = Case(1, writes, 150, 16, 4, 70)
    assert_problem_within_budget(make_problem(case, torch.float32, "cpu", "random"), "triton")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize(
    "wide", [("ssm_state",), ("conv_state", "ssm_state", *WEIGHTS)], ids=["ssm state", "states and weights"]
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_states_and_weights_may_be_wider_than_x(backend, wide, dtype, device):
    problem = make_problem(WIDE_CASES[0], dtype, device, "random", wide)
    _, conv_state, ssm_state = stride_write(**problem.inputs, gate=problem.gate, backend=backend)
    assert ssm_state.dtype == torch.float32 and conv_state.dtype == problem.inputs["conv_state"].dtype
    assert_problem_within_budget(problem, backend)


@pytest.mark.parametrize(("case", "gate"), in_turn([*SMALL_CASES, WIDE_CASES[-2]], GATES))
def test_blocked_equals_the_reference_in_double_precision(case, gate, device):
    problem = make_problem(case, torch.float64, device, gate)
    assert_equal_in_double(
        problem.results("blocked"), problem.results("reference"), terms=case.writes * (case.width + case.state)
    )


@pytest.mark.parametrize("elements", [1, 300, 10**6])
@pytest.mark.parametrize("gate", ["none", "random"])
def test_any_number_of_writes_may_be_held_at_a_time(gate, elements, monkeypatch):
    monkeypatch.setattr(blocked, "STATES_ON_CPU", elements)
    case = Case(writes=7)
    problem = make_problem(case, torch.float64, "cpu", gate)
    assert_equal_in_double(
        problem.results("blocked"), problem.results("reference"), terms=case.writes * (case.width + case.state)
    )


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.nbytes = max(self.nbytes, made.untyped_storage().nbytes() if isinstance(made, Tensor) else 0)
        return made


def test_states_of_many_writes_are_never_held_at_once():
    case = Case(1, 1000, 8, 16, 1, 2)
    problem = make_problem(case, torch.float32, "cpu")
    inputs, weights = (tuple(problem.inputs.values())[part] for part in (slice(4), slice(4, None)))
    weights = blocked.Weights(*weights)
    with Largest() as largest:
        *_, buffer = blocked.forward(*inputs, weights, None)
        blocked.backward(*problem.grads, buffer, *inputs, weights, None)
    assert buffer.nbytes == largest.nbytes < 4 * case.writes * case.width * case.state


@pytest.mark.parametrize("gate", ["none", "random"])
@pytest.mark.parametrize("writes", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradients_of_all_inputs_match_finite_differences(backend, writes, gate):
    problem = make_problem(Case(2, writes, 2, 2, 3, 1), torch.float64, "cpu", gate)
    inputs = tuple(value.requires_grad_() for value in problem.inputs.values())

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return stride_write(**dict(zip(INPUTS, values, strict=True)), gate=problem.gate, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("used", [0, 1, 2], ids=["y", "conv state", "ssm state"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradients_are_right_when_only_one_result_is_used(backend, used, device):
    problem = make_problem(WIDE_CASES[0], torch.float32 if backend == "triton" else torch.float64, device, "random")

    def gradients(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = [value.detach().to(dtype).requires_grad_() for value in problem.inputs.values()]
        out = stride_write(**dict(zip(INPUTS, inputs, strict=True)), gate=problem.gate, backend=backend)[used]
        grads = torch.autograd.grad(out, inputs, problem.grads[used].to(dtype), allow_unused=True)
        return {n: torch.zeros_like(i) if g is None else g for n, i, g in zip(INPUTS, inputs, grads, strict=True)}

    if backend == "triton":
        exact = functools.partial(gradients, "reference", torch.float64)
        assert_within_budget(gradients(backend, torch.float32), exact, gradients("reference", torch.float32))
    else:
        assert_equal_in_double(gradients(backend, torch.float64), gradients("reference", torch.float64), terms=8 * 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_middle_of_the_mamba_block_of_transformers(backend, device):
    config = MambaConfig(
        hidden_size=16, state_size=8, conv_kernel=4, expand=2, time_step_rank=3, num_hidden_layers=1, vocab_size=8
    )
    mixer = MambaMixer(config, layer_idx=0).eval()
    torch.nn.init.normal_(mixer.D)
    seen = {}
    mixer.in_proj.register_forward_hook(lambda module, inputs, output: seen.update(projected=output.detach()))
    mixer.out_proj.register_forward_pre_hook(lambda module, inputs: seen.update(y=inputs[0]))
    mixer(torch.randn(2, 13, 16))
    shapes = Case(2, 13, 32, 8, 4, 3).shapes()
    x, z = seen["projected"].chunk(2, dim=-1)
    inputs = {
        "x": x,
        "z": z,
        "conv_state": torch.zeros(shapes["conv_state"]),
        "ssm_state": torch.zeros(shapes["ssm_state"]),
        "conv_weight": mixer.conv1d.weight.squeeze(1),
        "conv_bias": mixer.conv1d.bias,
        "x_proj_weight": mixer.x_proj.weight,
        "dt_proj_weight": mixer.dt_proj.weight,
        "dt_proj_bias": mixer.dt_proj.bias,
        "a": -torch.exp(mixer.A_log),
        "d": mixer.D,
    }
    inputs = {name: value.to(device) for name, value in inputs.items()}  # the block stays where its own kernels are not
    weights = (mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj.weight, mixer.dt_proj.weight, mixer.dt_proj.bias)
    weights += (mixer.A_log, mixer.D)
    grad = torch.randn_like(seen["y"])

    def named(y: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(y, weights, grad.to(y), retain_graph=True)
        return {"y": y.detach()} | {f"d_{name}": value for name, value in zip(WEIGHTS, grads, strict=True)}

    ours = named(stride_write(**inputs, backend=backend)[0])
    exact = named(stride_write(**{name: value.double() for name, value in inputs.items()}, backend="reference")[0])
    exact = {name: value.double() for name, value in exact.items()}
    assert_within_budget(ours, exact, named(seen["y"]))


@pytest.mark.parametrize("writes", [1, 8])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_inputs_may_have_any_strides(backend, writes, device):
    problem = make_problem(Case(2, writes, 128, 16, 4, 4), torch.float32, device, "random")
    for name, value in problem.inputs.items():
        problem.inputs[name] = torch.stack([value, torch.full_like(value, float("nan"))], dim=-1)[..., 0]
    problem.gate = torch.stack([problem.gate, ~problem.gate], dim=-1)[..., 0]
    assert not any(value.is_contiguous() for value in (*problem.inputs.values(), problem.gate))
    assert_problem_within_budget(problem, backend)


@pytest.mark.parametrize("others", [0, 1], ids=["one projection", "two projections"])
@pytest.mark.parametrize("writes", [1, 8])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_x_and_z_may_be_parts_of_projections(backend, writes, others, device):
    problem = make_problem(Case(2, writes, 64, 16, 4, 4), torch.float32, device, "random")
    x, z = problem.inputs["x"], problem.inputs["z"]
    problem.inputs["x"] = torch.cat([x, z], dim=-1)[..., :64]
    problem.inputs["z"] = torch.cat([x, z, *[x] * others], dim=-1)[..., 64:128]
    assert_problem_within_budget(problem, backend)


@pytest.mark.parametrize("gate", ["none", "random"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits_and_leave_the_inputs_alone(backend, gate, device):
    problem = make_problem(Case(1, 9, 32, 16, 4, 4), torch.bfloat16, device, gate)
    before = {name: value.clone() for name, value in problem.inputs.items()}
    first, second = problem.results(backend), problem.results(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], problem.inputs[name]) for name in before)


def test_writes_without_conv_history_work():
    problem = make_problem(Case(taps=1), torch.float64, "cpu", "random")
    assert problem.inputs["conv_state"].shape == (2, 12, 0)
    assert_equal_in_double(problem.results("blocked"), problem.results("reference"), terms=8 * 16)
