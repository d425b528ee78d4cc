"""What the SSM write refuses, by name, and how it chooses its backend."""

from __future__ import annotations

import re

import pytest
import torch
from stride_write_problem import Case, make_problem

from smt_kernels import last_choice, stride_write


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
    "the backend is unknown": ({"backend": "cuda"}, ValueError, "backend must be one of triton, blocked"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_named(bad):
    changes, error, message = BAD_ARGUMENTS[bad]
    good = make_problem(Case(), torch.float32, "cpu", "random")
    with pytest.raises(error, match=re.escape(message)):
        stride_write(**{"gate": good.gate} | good.inputs | changes)
    stride_write(**good.inputs, gate=good.gate)
