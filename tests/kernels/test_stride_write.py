"""The stride-gated SSM write: every backend computes the definition, forward and backward, and keeps what the gate guards."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from smt_kernels import last_choice, stride_write
from smt_kernels.stride_write import blocked
from smt_kernels.testing.budget import assert_equal_in_double, assert_within_budget, poisoned_memory

BACKENDS = ["reference", "blocked"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GATES = ["none", "random", "all on", "all off"]
WEIGHTS = ("conv_weight", "conv_bias", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "a", "d")
INPUTS = ("x", "z", "conv_state", "ssm_state", *WEIGHTS)


@dataclass(frozen=True)
class Case:
    """Sizes of one problem, written B2-K8-E12-N4-C4-R3: rows, writes, width, state size, taps, rank of dt."""

    batch: int = 2
    writes: int = 8
    width: int = 12
    state: int = 4
    taps: int = 4
    rank: int = 3

    def __str__(self) -> str:
        return f"B{self.batch}-K{self.writes}-E{self.width}-N{self.state}-C{self.taps}-R{self.rank}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "x": (self.batch, self.writes, self.width),
            "z": (self.batch, self.writes, self.width),
            "conv_state": (self.batch, self.width, self.taps - 1),
            "ssm_state": (self.batch, self.width, self.state),
            "conv_weight": (self.width, self.taps),
            "conv_bias": (self.width,),
            "x_proj_weight": (self.rank + 2 * self.state, self.width),
            "dt_proj_weight": (self.width, self.rank),
            "dt_proj_bias": (self.width,),
            "a": (self.width, self.state),
            "d": (self.width,),
        }


SMALL_CASES = [Case(), Case(1, 1), Case(3, 1, taps=1), Case(1, 2, 5, 1, 2, 1), Case(3, 3, 33, 3, 5)]
# Wide enough that the largest error of a result says something about its precision.
WIDE_CASES = [
    Case(2, 8, 64, 16, 4, 4),
    Case(1, 1, 256, 16, 4, 16),
    Case(4, 1, 128, 8, 1, 8),
    Case(3, 5, 96, 12, 2, 6),
    Case(2, 24, 64, 16, 4, 4),
]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Problem:
    """Inputs of one call and the gradients of its three results."""

    inputs: dict[str, Tensor]
    grads: tuple[Tensor, Tensor, Tensor]
    gate: Tensor | None

    def results(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Results and gradients of the public function, with everything in ``dtype`` (None: as it is)."""
        inputs = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in self.inputs.items()}
        outputs = stride_write(**inputs, gate=self.gate, backend=backend)
        grads = [grad.to(out.dtype) for grad, out in zip(self.grads, outputs, strict=True)]
        found = torch.autograd.grad(outputs, list(inputs.values()), grads)
        named = dict(zip(("y", "new_conv_state", "new_ssm_state"), outputs, strict=True))
        return {name: out.detach() for name, out in named.items()} | {f"d_{n}": g for n, g in zip(inputs, found, strict=True)}

    def plain_results(self) -> dict[str, Tensor]:
        """What plain PyTorch of the same precision computes, with matrix products of as many rows as those over all writes.

        PyTorch sums products of few rows in another order, with about half the error: zero rows are appended, without effect.
        """
        batch, writes, _ = self.inputs["x"].shape
        more = batch * (writes - 1)

        def extend(value: Tensor) -> Tensor:
            return torch.cat([value, value.new_zeros(more, *value.shape[1:])])

        inputs = {name: extend(value) if name in INPUTS[:4] else value for name, value in self.inputs.items()}
        gate = None if self.gate is None else extend(self.gate)
        results = Problem(inputs, tuple(map(extend, self.grads)), gate).results("reference")
        per_weight = [f"d_{name}" for name in WEIGHTS]
        return {name: value if name in per_weight else value[:batch] for name, value in results.items()}


def make_gate(kind: str, case: Case, device: str) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "random":
        gate = torch.rand(case.batch, case.writes, device=device) < 0.5
        gate[0, 0] = ~gate[0, -1]  # at least one each way, where K > 1
        return gate
    return torch.full((case.batch, case.writes), kind == "all on", device=device)


def make_problem(case: Case, dtype: torch.dtype, device: str, gate: str = "none", wide: tuple[str, ...] = ()) -> Problem:
    """Inputs in (-1, 1) but for a < 0, a dt of about 0.1 and weights that keep the scale; those in ``wide`` in float32.

    Bounded, so that the largest error of a result is not that of one outlier.
    """
    inputs = {name: 2 * torch.rand(shape, device=device) - 1 for name, shape in case.shapes().items()}
    inputs["x_proj_weight"] /= case.width**0.5
    inputs["dt_proj_weight"] /= case.rank**0.5
    inputs["dt_proj_bias"] -= 2
    inputs["a"] = -torch.exp(2 * inputs["a"])
    inputs = {name: value.to(torch.float32 if name in wide else dtype) for name, value in inputs.items()}
    grads = tuple(2 * torch.rand_like(inputs[name]) - 1 for name in ("x", "conv_state", "ssm_state"))
    return Problem(inputs, grads, make_gate(gate, case, device))


def assert_problem_within_budget(problem: Problem) -> None:
    with poisoned_memory():
        actual = problem.results("blocked")
    assert_within_budget(actual, problem.results("reference", torch.float64), problem.plain_results())


def silu(value: float) -> float:
    return value / (1 + math.exp(-value))


def brute_force(inputs: dict[str, Tensor], gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of DESIGN 2.1 and 4.4 and of Mamba's algorithm 2, one number at a time, in Python's floats."""
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


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_formulas_of_the_design_computed_one_number_at_a_time(backend, case, gate):
    problem = make_problem(case, torch.float64, "cpu", gate)
    names = ("y", "new_conv_state", "new_ssm_state")
    expected = dict(zip(names, brute_force(problem.inputs, problem.gate), strict=True))
    actual = dict(zip(names, stride_write(**problem.inputs, gate=problem.gate, backend=backend), strict=True))
    assert_equal_in_double(actual, expected, terms=case.writes * (case.width + case.state))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("gate", ["none", "random"])
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_results_and_gradients_err_at_most_twice_as_much_as_plain_pytorch(case, gate, dtype, device):
    assert_problem_within_budget(make_problem(case, dtype, device, gate))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize(
    "wide", [("ssm_state",), ("conv_state", "ssm_state", *WEIGHTS)], ids=["ssm state", "states and weights"]
)
def test_states_and_weights_may_be_wider_than_x(wide, dtype, device):
    problem = make_problem(WIDE_CASES[0], dtype, device, "random", wide)
    _, conv_state, ssm_state = stride_write(**problem.inputs, gate=problem.gate)
    assert ssm_state.dtype == torch.float32 and conv_state.dtype == problem.inputs["conv_state"].dtype
    assert_problem_within_budget(problem)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("case", [*SMALL_CASES, WIDE_CASES[-1]], ids=str)
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


@pytest.mark.parametrize("gate", ["none", "random"])
@pytest.mark.parametrize("writes", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_all_inputs_match_finite_differences(backend, writes, gate):
    problem = make_problem(Case(2, writes, 2, 2, 3, 1), torch.float64, "cpu", gate)
    inputs = tuple(value.requires_grad_() for value in problem.inputs.values())

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return stride_write(**dict(zip(INPUTS, values, strict=True)), gate=problem.gate, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("used", [0, 1, 2], ids=["y", "conv state", "ssm state"])
def test_gradients_are_right_when_only_one_result_is_used(used, device):
    problem = make_problem(Case(), torch.float64, device, "random")
    found = []
    for backend in BACKENDS:
        inputs = [value.detach().requires_grad_() for value in problem.inputs.values()]
        out = stride_write(**dict(zip(INPUTS, inputs, strict=True)), gate=problem.gate, backend=backend)[used]
        grads = torch.autograd.grad(out, inputs, problem.grads[used], allow_unused=True)
        found.append({n: torch.zeros_like(i) if g is None else g for n, i, g in zip(INPUTS, inputs, grads, strict=True)})
    assert_equal_in_double(found[1], found[0], terms=8 * 16)


@pytest.mark.parametrize("gate", ["random", "all off"])
@pytest.mark.parametrize("writes", [1, 8])
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


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=dtype_id)
@pytest.mark.parametrize("writes", [1, 8])
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_writes_equal_the_writes_of_each_row_alone(backend, device):
    case = Case(3, 9)
    problem = make_problem(case, torch.float64, device, "random")
    gated = stride_write(**problem.inputs, gate=problem.gate, backend=backend)
    for row in range(case.batch):
        on = problem.gate[row]
        if not on.any():
            continue
        alone = {n: v[row : row + 1] if n in INPUTS[:4] else v for n, v in problem.inputs.items()}
        alone |= {name: alone[name][:, on] for name in ("x", "z")}
        y, *states = stride_write(**alone, backend=backend)
        expected = {"y": y[0], "conv": states[0][0], "ssm": states[1][0]}
        actual = {"y": gated[0][row, on], "conv": gated[1][row], "ssm": gated[2][row]}
        assert_equal_in_double(actual, expected, terms=case.writes * (case.width + case.state))


@pytest.mark.parametrize("gate", ["none", "random"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_call_equals_calls_in_pieces_with_carried_states(backend, gate, device):
    case = Case(2, 11)
    problem = make_problem(case, torch.float64, device, gate)
    whole = problem.results(backend)
    inputs = {name: value.detach().requires_grad_() for name, value in problem.inputs.items()}
    states, outputs = {name: inputs[name] for name in ("conv_state", "ssm_state")}, []
    for start, stop in ((0, 1), (1, 3), (3, 11)):
        piece = inputs | states | {name: inputs[name][:, start:stop] for name in ("x", "z")}
        y, *new = stride_write(**piece, gate=None if gate == "none" else problem.gate[:, start:stop], backend=backend)
        states = dict(zip(states, new, strict=True))
        outputs.append(y)
    results = torch.cat(outputs, dim=1), *states.values()
    pieces = dict(zip(whole, [*results, *torch.autograd.grad(results, list(inputs.values()), problem.grads)], strict=True))
    assert_equal_in_double(pieces, whole, terms=case.writes * (case.width + case.state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_middle_of_the_mamba_block_of_transformers(backend):
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
    weights = (mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj.weight, mixer.dt_proj.weight, mixer.dt_proj.bias)
    weights += (mixer.A_log, mixer.D)
    grad = torch.randn_like(seen["y"])

    def named(y: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(y, weights, grad.to(y.dtype), retain_graph=True)
        return {"y": y.detach()} | {f"d_{name}": value for name, value in zip(WEIGHTS, grads, strict=True)}

    ours = named(stride_write(**inputs, backend=backend)[0])
    exact = named(stride_write(**{name: value.double() for name, value in inputs.items()}, backend="reference")[0])
    exact = {name: value.double() for name, value in exact.items()}
    assert_within_budget(ours, exact, named(seen["y"]))


def test_inputs_may_have_any_strides(device):
    problem = make_problem(WIDE_CASES[0], torch.float32, device, "random")
    for name, value in problem.inputs.items():
        problem.inputs[name] = torch.stack([value, torch.full_like(value, float("nan"))], dim=-1)[..., 0]
    problem.gate = problem.gate.T.contiguous().T
    assert not any(value.is_contiguous() for value in (*problem.inputs.values(), problem.gate))
    assert_problem_within_budget(problem)


def test_x_and_z_may_be_halves_of_one_projection(device):
    problem = make_problem(WIDE_CASES[0], torch.float32, device, "random")
    x, z = torch.cat([problem.inputs["x"], problem.inputs["z"]], dim=-1).chunk(2, dim=-1)
    problem.inputs |= {"x": x, "z": z}
    assert_problem_within_budget(problem)


@pytest.mark.parametrize("gate", ["none", "random"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits_and_leave_the_inputs_alone(backend, gate, device):
    problem = make_problem(Case(2, 20, 64, 16, 4, 4), torch.bfloat16, device, gate)
    before = {name: value.clone() for name, value in problem.inputs.items()}
    first, second = problem.results(backend), problem.results(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], problem.inputs[name]) for name in before)


@pytest.mark.parametrize("gate", ["none", "random"])
@pytest.mark.parametrize("writes", [1, 3])
def test_the_operators_pass_opcheck(writes, gate, device):
    problem = make_problem(Case(2, writes, 5), torch.float32, device, gate)
    operators = torch.ops.smt_kernels
    arguments = [value.requires_grad_() for value in problem.inputs.values()]
    torch.library.opcheck(operators.stride_write.default, (*arguments, problem.gate, "blocked"))
    values = [value.detach() for value in arguments]
    for grads in (problem.grads, (problem.grads[0], None, None)):
        torch.library.opcheck(operators.stride_write_backward.default, (*grads, *values, problem.gate, "blocked"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_without_graph_breaks(backend, device):
    problem = make_problem(Case(), torch.float32, device, "random")

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        y, conv_state, ssm_state = stride_write(**inputs, gate=problem.gate, backend=backend)
        return y.sin(), conv_state, ssm_state

    def results(function) -> list[Tensor]:
        inputs = {name: value.detach().clone().requires_grad_() for name, value in problem.inputs.items()}
        outputs = function(inputs)
        return [*outputs, *torch.autograd.grad(outputs, list(inputs.values()), problem.grads)]

    torch._dynamo.reset()
    compiled = results(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, results(call), strict=True):
        assert torch.equal(actual, expected)


def test_the_choice_of_backend_is_remembered():
    stride_write(**make_problem(Case(), torch.float32, "cpu").inputs)
    assert last_choice("stride_write").backend == "blocked"


BAD_ARGUMENTS = {
    "x is no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x has two dimensions": ({"x": torch.zeros(2, 12)}, ValueError, "x must have shape (B, K, E), got (2, 12)"),
    "x has no writes": ({"x": torch.zeros(2, 0, 12)}, ValueError, "x must not be empty in K"),
    "x is of integers": ({"x": torch.zeros(2, 8, 12, dtype=torch.int64)}, TypeError, "x must be a floating-point tensor"),
    "z has other writes": ({"z": torch.zeros(2, 7, 12)}, ValueError, "z must have shape (B=2, K=8, E=12), got (2, 7, 12)"),
    "z has another dtype": ({"z": torch.zeros(2, 8, 12).half()}, TypeError, "z must have the dtype of x, torch.float32"),
    "conv_state is too long": (
        {"conv_state": torch.zeros(2, 12, 4)}, ValueError, "conv_state must have shape (B=2, E=12, C - 1=3), got (2, 12, 4)",
    ),
    "conv_state has another dtype": (
        {"conv_state": torch.zeros(2, 12, 3).bfloat16()}, TypeError, "conv_state must be torch.float32 for x of torch.float32",
    ),
    "ssm_state has other rows": ({"ssm_state": torch.zeros(3, 12, 4)}, ValueError, "must have shape (B=2, E=12, N=4)"),
    "ssm_state is on another device": (
        {"ssm_state": torch.zeros(2, 12, 4, device="meta")}, ValueError, "ssm_state must be on the device of x, cpu, got meta",
    ),
    "ssm_state is float64": ({"ssm_state": torch.zeros(2, 12, 4).double()}, TypeError, "ssm_state must be torch.float32"),
    "conv_weight has a channel axis": ({"conv_weight": torch.zeros(12, 1, 4)}, ValueError, "must have shape (E=12, C)"),
    "conv_weight is float16": ({"conv_weight": torch.zeros(12, 4).half()}, TypeError, "conv_weight must be torch.float32"),
    "conv_bias is too long": ({"conv_bias": torch.zeros(13)}, ValueError, "conv_bias must have shape (E=12), got (13,)"),
    "x_proj_weight is transposed": ({"x_proj_weight": torch.zeros(12, 11)}, ValueError, "(R + 2 N=11, E=12), got (12, 11)"),
    "dt_proj_weight is transposed": ({"dt_proj_weight": torch.zeros(3, 12)}, ValueError, "must have shape (E=12, R)"),
    "dt_proj_bias is missing": ({"dt_proj_bias": None}, TypeError, "dt_proj_bias must be a tensor, got NoneType"),
    "a has other channels": ({"a": torch.zeros(11, 4)}, ValueError, "a must have shape (E=12, N), got (11, 4)"),
    "d is a matrix": ({"d": torch.zeros(12, 1)}, ValueError, "d must have shape (E=12), got (12, 1)"),
    "gate has other writes": ({"gate": torch.ones(2, 9, dtype=torch.bool)}, ValueError, "gate must have shape (B=2, K=8)"),
    "gate is of integers": ({"gate": torch.ones(2, 8, dtype=torch.int32)}, TypeError, "gate must be bool, got torch.int32"),
    "gate is on another device": (
        {"gate": torch.ones(2, 8, dtype=torch.bool, device="meta")}, ValueError, "gate must be on the device of x, cpu",
    ),
    "the backend has no kernel": ({"backend": "triton"}, ValueError, "stride_write has no Triton kernel yet"),
    "the backend is unknown": ({"backend": "cuda"}, ValueError, "backend must be one of triton, blocked"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_named(bad):
    changes, error, message = BAD_ARGUMENTS[bad]
    good = make_problem(Case(), torch.float32, "cpu", "random")
    with pytest.raises(error, match=re.escape(message)):
        stride_write(**{"gate": good.gate} | good.inputs | changes)
    stride_write(**good.inputs, gate=good.gate)


def test_writes_without_conv_history_work():
    problem = make_problem(Case(taps=1), torch.float64, "cpu", "random")
    assert problem.inputs["conv_state"].shape == (2, 12, 0)
    assert_equal_in_double(problem.results("blocked"), problem.results("reference"), terms=8 * 16)
