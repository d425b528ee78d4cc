"""The memory's writes as one operation: every backend computes the definition, forward and backward, in few launches."""

from __future__ import annotations

import pytest
import torch
from pairs import in_turn
from stride_memory_problem import (
    BACKENDS,
    CASES,
    FAST_BACKENDS,
    RESULTS,
    WINDOW,
    Case,
    make_problem,
    poisoned_results,
    relative_errors,
)
from stride_write_problem import dtype_id
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smt_kernels import MemoryWeights, WindowSpec, stride_memory
from smt_kernels.testing.budget import assert_equal_in_double, poisoned_memory

SMALL = ("norm", "conv_weight", "conv_bias", "dt_bias", "a", "d", "norm_f", "conv_state", "ssm_state")
TINY = Case("tiny", writes=3, slots=1, first_write=1, first_step=1, gate=True, dropout=True, width=4, inner=3, state=2, taps=3,
            rank=2, key=3, window=WindowSpec(2, 3, 2))  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocked_equals_the_reference_in_double_precision(case, device):
    problem = make_problem(case, torch.float64, device)
    expected = problem.results("reference")
    assert_equal_in_double(poisoned_results(problem, "blocked"), expected, terms=case.layers * case.writes * case.inner)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradients_of_all_inputs_match_finite_differences(backend):
    problem = make_problem(TINY, torch.float64, "cpu")
    kept = problem.gate[..., None]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        results = problem.call(dict(zip(problem.tensors, values, strict=True)), backend)
        return results.pop("slots") * kept, *results.values()

    assert torch.autograd.gradcheck(call, tuple(value.requires_grad_() for value in problem.tensors.values()), fast_mode=True)


@pytest.mark.parametrize(("case", "dtype"), in_turn(CASES, [torch.bfloat16, torch.float32, torch.float16], dtype_id))
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_results_and_gradients_err_at_most_twice_as_much_as_plain_pytorch(backend, case, dtype, device):
    problem = make_problem(case, dtype, device, wide=SMALL)  # as under autocast
    exact = problem.results("reference", torch.float64)
    plain = relative_errors(problem.results("reference"), exact)
    for kind, error in relative_errors(poisoned_results(problem, backend), exact).items():
        assert error <= 2 * plain[kind], kind


ONE_LAYER = Case("one layer", writes=3, first_write=1, slots=2, first_step=1, layers=1, gate=True, dropout=True)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_inputs_may_have_any_strides_and_any_writes_may_happen(backend, device):
    problem = make_problem(ONE_LAYER, torch.float32, device)
    problem.gate = torch.tensor([[False, True, False], [True, False, True]], device=device)
    problem.grads["slots"] *= problem.gate[..., None]
    exact = problem.results("reference", torch.float64)
    plain = relative_errors(problem.results("reference"), exact)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, ~x if x.dtype == torch.bool else torch.full_like(x, float("nan"))], dim=-1)[..., 0]

    problem.gate, problem.dropout = strided(problem.gate), strided(problem.dropout)
    for tensors in (problem.tensors, problem.grads):
        tensors.update({name: strided(value) for name, value in tensors.items()})
    for kind, error in relative_errors(poisoned_results(problem, backend), exact).items():
        assert error <= 2 * plain[kind], kind


@pytest.mark.parametrize("used", RESULTS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradients_are_right_when_only_one_result_is_used(backend, used, device):
    problem = make_problem(ONE_LAYER, torch.float32, device)

    def gradients(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = {name: value.detach().to(dtype).requires_grad_() for name, value in problem.tensors.items()}
        out, grad = problem.call(tensors, backend)[used], problem.grads[used].to(dtype)
        return dict(zip(tensors, torch.autograd.grad(out, list(tensors.values()), grad, materialize_grads=True), strict=True))

    exact, plain = gradients("reference", torch.float64), gradients("reference", torch.float32)
    with poisoned_memory():
        actual = gradients(backend, torch.float32)
    reached = [name for name, value in exact.items() if value.any()]
    assert not any(actual[name].any() for name in exact if name not in reached)

    def error(found: dict[str, Tensor]) -> float:
        return (
            torch.cat([(found[name].double() - exact[name]).flatten() / exact[name].norm() for name in reached]).norm().item()
        )

    assert error(actual) <= 2 * error(plain)


@pytest.mark.triton
@pytest.mark.parametrize("programs", [2, 256], ids=["several rows a program", "a row a program"])
def test_the_norm_of_any_number_of_rows_is_that_of_pytorch(programs, monkeypatch, device):
    from smt_kernels.stride_memory import norm

    monkeypatch.setattr(norm, "PROGRAMS", programs)
    x, update, grad, residual = torch.randn(4, 5, 12, device=device)
    x[1] *= 1e-3  # so that eps tells
    weight = torch.randn(12, device=device)
    total, normed, out = torch.empty_like(x), torch.empty_like(x), torch.empty(1, 5, 12, device=device).transpose(0, 1)
    norm.add_and_norm(x, update * 1e-3, weight, total, normed, out)
    leaves = (x + update * 1e-3).requires_grad_(), weight.clone().requires_grad_()
    expected = torch.nn.functional.rms_norm(leaves[0], (12,), leaves[1], 1e-5)
    d_x, d_narrow = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    d_weight = torch.ones(norm.weight_sums(5), 12, device=device)
    norm.norm_backward(grad, total, weight, residual, d_x, d_narrow, d_weight)
    of_x, of_weight = torch.autograd.grad(expected, leaves, grad)
    wanted = leaves[0], expected, expected[:, None], of_x + residual, of_weight + len(d_weight)
    for found, value in zip((total, normed, out, d_x, d_weight.sum(0)), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    assert torch.equal(d_narrow, d_x.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits_and_leave_the_inputs_alone(backend, device):
    problem = make_problem(Case("twice", writes=3, layers=1, first_write=1, slots=1, gate=True), torch.bfloat16, device)
    before = {name: value.clone() for name, value in problem.tensors.items()}
    first, second = problem.results(backend), problem.results(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], problem.tensors[name]) for name in before)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_row_that_makes_no_write_keeps_its_states_bit_for_bit(backend, device):
    problem = make_problem(CASES[1], torch.float32, device)
    problem.gate[0] = False
    problem.tensors["ssm_state"][:, 0, 0, 0] = -0.0
    results = problem.call(problem.tensors, backend)
    for name in ("conv_state", "ssm_state"):
        kept, new = problem.tensors[name][:, 0], results[name][:, 0]
        assert torch.equal(kept, new) and torch.equal(kept.signbit(), new.signbit())


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_writes_in_pieces_are_the_writes_of_one_call(backend, device):
    """Cut at the end of a group and inside one."""
    whole = make_problem(Case("whole", writes=6, layers=2), torch.float32, device)
    tensors, window = whole.tensors, WINDOW
    weights = MemoryWeights(*(tensors[name] for name in MemoryWeights._fields))
    expected = whole.call(tensors, backend)
    slots, conv, ssm = tensors["slots"], tensors["conv_state"], tensors["ssm_state"]
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        sizes = {"window": window, "write_group": 2, "first_write": start, "n_writes": stop - start}
        piece = stride_memory(tensors["tokens"], slots, conv, ssm, weights, **sizes, backend=backend)
        slots, conv, ssm = torch.cat([slots, piece.slots], dim=1), piece.conv_state, piece.ssm_state
        torch.testing.assert_close(piece.pooling, expected["pooling"][:, start:stop])
    for actual, name in ((slots, "slots"), (conv, "conv_state"), (ssm, "ssm_state")):
        torch.testing.assert_close(actual, expected[name])


class Operations(TorchDispatchMode):
    """What a pass asks of the device: every operator but those that allocate, or only look at memory in another way."""

    FREE = ("empty", "view", "slice", "select", "transpose", "t.", "permute", "unsqueeze", "split", "expand", "detach", "alias",
            "as_strided", "unbind", "new_empty", "empty_like", "_unsafe_view", "squeeze")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.n_views = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.names.append(name)
        self.n_views += function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.triton
@pytest.mark.interpreter
def test_a_group_and_layer_are_six_launches_in_each_direction_and_nothing_leaves_the_device(monkeypatch):
    from smt_kernels.attention_pool import kernels as pooling
    from smt_kernels.attention_pool.reference import Timeline
    from smt_kernels.stride_memory import kernels, norm
    from smt_kernels.stride_memory.reference import Inputs, Pass
    from smt_kernels.stride_write import conv_states, convolution, convolution_backward, fold, scan

    def operations(case: Case) -> tuple[Operations, Operations]:
        problem = make_problem(case, torch.float32, "cpu")
        tensors = problem.tensors
        weights = MemoryWeights(*(tensors[name] for name in MemoryWeights._fields))
        inputs = Inputs(tensors["conv_state"], tensors["ssm_state"], problem.gate, problem.dropout)
        timeline = Timeline(0, case.writes, case.group, 0, 0)
        run = Pass(tensors["tokens"], tensors["slots"], weights, inputs, case.window, timeline, normalise=True)
        with Operations() as forward:
            counted.append(forward)
            *outputs, buffer = kernels.forward(run)
        grads = [torch.rand_like(out) for out in outputs[:3]]
        with Operations() as backward:
            counted.append(backward)
            kernels.backward(*grads, None, outputs[3], buffer, run)
        return forward, backward

    counted: list[Operations] = []

    def launch(kernel, grid, device, *arguments, **named):  # and leave what it would compute as it is
        counted[-1].names.append(f"launch of {kernel.fn.__name__}")

    for module in (pooling, norm, convolution, convolution_backward, conv_states, fold, scan):
        monkeypatch.setattr(module, "launch", launch)
    sizes = [(layers, writes) for layers in (1, 2) for writes in (2, 6)]
    of_size = [operations(Case("counted", 1, writes, 2, layers, dropout=True)) for layers, writes in sizes]
    for of_direction in zip(*of_size, strict=True):
        found = dict(zip(sizes, of_direction, strict=True))
        # From one group to three, with one layer and with two: two groups of one layer, without what is per pass or per group.
        of_two = [len(found[layers, 6].names) - len(found[layers, 2].names) for layers in (1, 2)]
        assert of_two[1] - of_two[0] == 2 * 6, found[2, 6].names
        views = [found[layers, 6].n_views - found[layers, 2].n_views for layers in (1, 2)]
        assert views[1] == views[0], "the host forms views of all layers at once"
        leaving = ("_local_scalar_dense", "item", "nonzero", "lift_fresh", "_to_copy.device", "is_nonzero", "equal")
        assert not [name for name in found[2, 6].names if name.startswith(leaving)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_writes": 0}, ValueError, "gate must have shape|n_writes must be at least 1, got 0"),
        ({"write_group": 0}, ValueError, "write_group must be at least 1, got 0"),
        ({"first_write": 9}, ValueError, "tokens must hold the steps"),
        ({"window": WindowSpec(2, 3, None)}, ValueError, "window must have a stride"),
        ({"slots": torch.zeros(1, 2, 4)}, ValueError, r"slots must have shape \(B=2, n, d=4\), got \(1, 2, 4\)"),
        ({"ssm_state": torch.zeros(2, 2, 3, 9)}, ValueError, r"ssm_state must have shape \(L=2, B=2, E=3, N=2\)"),
        ({"gate": torch.ones(2, 3)}, TypeError, "gate must be bool, got torch.float32"),
        ({"dropout_mask": torch.ones(2, 3, 9)}, ValueError, "dropout_mask must have shape"),
        ({"conv_state": torch.zeros(2, 2, 3, 2, dtype=torch.float16)}, TypeError, "conv_state must be torch.float32"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, error, message):
    problem = make_problem(TINY, torch.float32, "cpu")
    tensors, case = problem.tensors, problem.case
    arguments = {name: tensors[name] for name in ("tokens", "slots", "conv_state", "ssm_state")}
    arguments |= {"weights": MemoryWeights(*(tensors[name] for name in MemoryWeights._fields)), "window": case.window}
    arguments |= {"first_write": case.first_write, "n_writes": case.writes, "write_group": case.group, "first_step": 1}
    stride_memory(**arguments)
    with pytest.raises(error, match=message):
        stride_memory(**arguments | change)
