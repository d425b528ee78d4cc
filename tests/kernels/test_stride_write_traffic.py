"""The SSM write launches few kernels, which move little more than their arguments, and nothing that is not their own."""

from __future__ import annotations

import pytest
import torch
from stride_write_problem import WEIGHTS, Case, make_problem
from torch import Tensor

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]


def count(case: Case, monkeypatch: pytest.MonkeyPatch, gate: str = "random", family: str = "interpreter"):
    """Traffic of forward and backward, each with the bytes of all tensors that its kernels take, each moved once."""
    from smt_kernels import launch
    from smt_kernels.stride_write import conv_states, convolution, convolution_backward, fold, kernels, scan, single_write
    from smt_kernels.testing.traffic import count_traffic

    least = 0

    def weighed(kernel, grid, device, **arguments):
        nonlocal least
        least += sum(argument.nbytes for argument in arguments.values() if isinstance(argument, Tensor))
        launch.launch(kernel, grid, device, **arguments)

    monkeypatch.setattr(launch, "architecture_family", lambda device: family)
    for module in (convolution, convolution_backward, conv_states, fold, scan, single_write):
        monkeypatch.setattr(module, "launch", weighed)
    problem = make_problem(case, torch.bfloat16, "cpu", gate, wide=("ssm_state", "a"))
    inputs = [value for name, value in problem.inputs.items() if name not in WEIGHTS]
    rest = tuple(problem.inputs[name] for name in WEIGHTS), problem.gate
    with count_traffic() as forward:
        *_, kept = kernels.forward(*inputs, *rest)
    least_forward, least = least, 0
    with count_traffic() as backward:
        kernels.backward(*problem.grads, kept, *inputs, *rest)
    return forward, least_forward, backward, least


@pytest.mark.parametrize("writes", [1, 17], ids="K{}".format)
def test_a_single_write_is_one_launch_several_are_four_and_going_back_is_four(writes, monkeypatch):
    forward, _, backward, _ = count(Case(2, writes), monkeypatch)
    assert len(forward.launches) == (1 if writes == 1 else 4)  # convolution, the sum of its shares, scan, and the conv state
    assert len(backward.launches) == 4  # scan, the sum of its shares, convolution, and the conv state


@pytest.mark.parametrize("writes", [2, 8], ids="K{}".format)
def test_several_writes_move_what_they_must(writes, monkeypatch):
    forward, least_forward, backward, least_backward = count(Case(1, writes, 128, 16, 4, 8), monkeypatch, "all on")
    reread = 3 * writes * 128 * 2  # x, once per tap
    assert forward.bytes <= 1.05 * least_forward + reread
    assert backward.bytes <= 1.5 * least_backward


def test_a_single_write_reads_only_x_and_the_conv_state_with_its_weights_twice(monkeypatch):
    forward, least, _, _ = count(Case(1, 1, 128, 16, 4, 8), monkeypatch, "all on")
    twice = sum(forward.read[name] for name in ("x", "conv_state", "conv_weight", "conv_bias")) // 2
    assert forward.bytes <= least + twice


def test_a_single_write_that_is_off_reads_no_weights_and_writes_what_it_keeps(monkeypatch):
    forward, _, _, _ = count(Case(3, 1, 128, 16, 4, 8), monkeypatch, "all off")
    assert not any(forward.read[name] for name in (*WEIGHTS, "x", "z"))
    assert forward.read["ssm_state"] == forward.written["new_ssm_state"] == 3 * 128 * 16 * 4


@pytest.mark.parametrize("family", ["interpreter", "hopper"])
@pytest.mark.parametrize("case", [Case(2, 1), Case(2, 9, 70, 5, 3, 2), Case(1, 2, 33, 3, 1, 3)], ids=str)
def test_no_program_leaves_its_tensors_or_meets_another(case, family, monkeypatch):
    forward, _, backward, _ = count(case, monkeypatch, family=family)
    for traffic in (forward, backward):
        assert not traffic.raced and not traffic.atomics and traffic.launches
