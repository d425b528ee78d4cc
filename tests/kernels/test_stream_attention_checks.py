"""What stream attention refuses, by name, and how it chooses its backend."""

from __future__ import annotations

import re

import pytest
import torch
from stream_attention_problem import Case, make_problem

from smt_kernels import WindowSpec, last_choice, stream_attention


def test_cpu_tensors_run_blocked():
    problem = make_problem(Case(3))
    stream_attention(**problem.inputs, **problem.settings)
    assert last_choice("stream_attention").backend == "blocked"


def good_arguments() -> dict[str, object]:
    q, k = torch.zeros(2, 6, 4, 8), torch.zeros(2, 7, 2, 8)
    memory = torch.zeros(2, 3, 2, 8)
    return {"q": q, "k": k, "v": k, "memory_k": memory, "memory_v": memory, "window": WindowSpec()}


BAD_ARGUMENTS = {
    "q is no tensor": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "q has three dimensions": ({"q": torch.zeros(6, 4, 8)}, ValueError, "q must have shape (B, T, H, D), got (6, 4, 8)"),
    "q is of integers": ({"q": torch.zeros(2, 6, 4, 8).int()}, TypeError, "q must be a floating-point tensor"),
    "the batch is empty": ({"q": torch.zeros(0, 6, 4, 8)}, ValueError, "q must not be empty in B"),
    "there are no queries": ({"q": torch.zeros(2, 0, 4, 8)}, ValueError, "q must not be empty in T"),
    "k has another batch": ({"k": torch.zeros(3, 7, 2, 8)}, ValueError, "k must have shape (B=2, S, H_kv, D=8), got (3, 7, 2"),
    "k has another head size": ({"k": torch.zeros(2, 7, 2, 4)}, ValueError, "k must have shape (B=2, S, H_kv, D=8)"),
    "k has another dtype": ({"k": torch.zeros(2, 7, 2, 8).half()}, TypeError, "k must have the dtype of q, torch.float32"),
    "k is shorter than q": (
        {name: torch.zeros(2, 5, 2, 8) for name in "kv"}, ValueError,
        "k must hold the keys of all T = 6 queries, S >= T, got S = 5",
    ),
    "v has another length": ({"v": torch.zeros(2, 6, 2, 8)}, ValueError, "v must have shape (B=2, S=7, H_kv=2, D=8)"),
    "v is on another device": (
        {"v": torch.zeros(2, 7, 2, 8, device="meta")}, ValueError, "v must be on the device of q, cpu, got meta",
    ),
    "heads do not divide": (
        {name: torch.zeros(2, n, 3, 8) for name, n in {"k": 7, "v": 7, "memory_k": 3, "memory_v": 3}.items()},
        ValueError, "q has 4 heads, which is not a multiple of the 3",
    ),
    "memory_k without memory_v": ({"memory_v": None}, ValueError, "memory_v must be given together with memory_k, got None"),
    "memory_v without memory_k": ({"memory_k": None}, ValueError, "memory_k must be given together with memory_v, got None"),
    "memory_k has other heads": (
        {"memory_k": torch.zeros(2, 3, 4, 8)}, ValueError, "memory_k must have shape (B=2, K, H_kv=2, D=8), got (2, 3, 4, 8)",
    ),
    "memory_v has another length": (
        {"memory_v": torch.zeros(2, 4, 2, 8)}, ValueError, "memory_v must have shape (B=2, K=3, H_kv=2, D=8), got (2, 4, 2, 8)",
    ),
    "memory_v has another dtype": ({"memory_v": torch.zeros(2, 3, 2, 8).double()}, TypeError, "memory_v must have the dtype"),
    "memory_k is on another device": (
        {"memory_k": torch.zeros(2, 3, 2, 8, device="meta")}, ValueError, "memory_k must be on the device of q, cpu, got meta",
    ),
    "window is no WindowSpec": ({"window": (15, 50, 16)}, TypeError, "window must be a WindowSpec, got tuple"),
    "window has no tokens": ({"window": WindowSpec(15, 0, None)}, ValueError, "window.n_tokens must be at least 1"),
    "first_step is no int": ({"first_step": 1.0}, TypeError, "first_step must be an int, got 1.0"),
    "first_slot is no int": ({"first_slot": True}, TypeError, "first_slot must be an int, got True"),
    "backend is unknown": ({"backend": "cuda"}, ValueError, "backend must be one of triton, blocked, reference, got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_named(bad):
    changes, error, message = BAD_ARGUMENTS[bad]
    with pytest.raises(error, match=re.escape(message)):
        stream_attention(**good_arguments() | changes)
    stream_attention(**good_arguments())
