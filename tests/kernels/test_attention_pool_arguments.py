"""Attention pooling names every bad argument, and tells which backend ran."""

from __future__ import annotations

import re

import pytest
import torch
from attention_pool_problem import SMALL, Sequence, make_sequence, make_windows

from smt_kernels import WindowSpec, attention_pool, attention_pool_sequence, last_choice


def test_the_choice_of_backend_is_remembered():
    for problem in (make_windows(torch.float32, "cpu"), make_sequence(Sequence(), torch.float32, "cpu")):
        problem.results("reference")
        assert last_choice(problem.function.__name__).reason == "asked for by the backend argument"
        problem.function(**problem.inputs, **problem.settings)
        assert last_choice(problem.function.__name__).backend == "blocked"


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_entries_are_normalised_and_groups_are_of_one_write_unless_told_otherwise(backend):
    for problem in (make_windows(torch.float32, "cpu"), make_sequence(Sequence(), torch.float32, "cpu")):
        told = problem.settings | {"normalise": True} | ({} if "n_memory" in problem.settings else {"write_group": 1})
        untold = {name: value for name, value in problem.settings.items() if name != "normalise"}
        pooled, expected = (problem.function(**problem.inputs, **of, backend=backend)[0] for of in (untold, told))
        assert torch.equal(pooled, expected)


NONE = torch.zeros(2, dtype=torch.int32)
BAD_WINDOWS = {
    "windows is no tensor": ({"windows": None}, TypeError, "windows must be a tensor, got NoneType"),
    "windows has two dimensions": ({"windows": torch.zeros(6, 4)}, ValueError, "windows must have shape (N, W, d), got (6, 4)"),
    "windows is empty": ({"windows": torch.zeros(2, 0, 4)}, ValueError, "windows must not be empty in W"),
    "windows is of integers": ({"windows": torch.zeros(2, 6, 4).int()}, TypeError, "windows must be a floating-point tensor"),
    "w_q has another width": ({"w_q": torch.zeros(3, 5)}, ValueError, "w_q must have shape (d_k, d=4), got (3, 5)"),
    "w_k has another d_k": ({"w_k": torch.zeros(2, 4)}, ValueError, "w_k must have shape (d_k=3, d=4), got (2, 4)"),
    "w_q has another dtype": ({"w_q": torch.zeros(3, 4).half()}, TypeError, "w_q must have the dtype of windows"),
    "w_k is on another device": ({"w_k": torch.zeros(3, 4, device="meta")}, ValueError, "w_k must be on the device of"),
    "n_memory is no int": ({"n_memory": 2.0}, TypeError, "n_memory must be an int, got 2.0"),
    "n_memory is too large": ({"n_memory": 7}, ValueError, "n_memory must lie in 0..W = 0..6, got 7"),
    "n_memory is negative": ({"n_memory": -1}, ValueError, "n_memory must lie in 0..W = 0..6, got -1"),
    "counts are of another dtype": ({"valid_memory": torch.tensor([0, 2])}, TypeError, "valid_memory must be int32"),
    "counts are of another length": ({"valid_tokens": torch.ones(3).int()}, ValueError, "valid_tokens must have shape (N=2)"),
    "counts are too large": ({"valid_memory": torch.tensor([0, 3]).int()}, ValueError, "must lie in 0..2, got [0, 3]"),
    "a window is empty": ({"valid_memory": NONE, "valid_tokens": torch.tensor([4, 0]).int()}, ValueError, "in windows [1]"),
    "a window has neither memory nor tokens": (
        {"n_memory": 0, "valid_memory": None, "valid_tokens": NONE}, ValueError, "at least 1 in every window, got 0 in",
    ),
    "dropout_mask has another shape": ({"dropout_mask": torch.ones(2, 5)}, ValueError, "must have shape (N=2, W=6)"),
    "dropout_mask is boolean": ({"dropout_mask": torch.ones(2, 6).bool()}, TypeError, "must have the dtype of windows"),
    "the backend is unknown": ({"backend": "cuda"}, ValueError, "backend must be one of triton, blocked, reference"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_WINDOWS)
def test_bad_arguments_for_windows_are_named(bad):
    changes, error, message = BAD_WINDOWS[bad]
    counts = torch.tensor([0, 2], dtype=torch.int32)
    good = {"windows": torch.ones(2, 6, 4), "w_q": torch.ones(3, 4), "w_k": torch.ones(3, 4), "n_memory": 2}
    good |= {"valid_memory": counts, "valid_tokens": counts + 1, "dropout_mask": torch.ones(2, 6)}
    with pytest.raises(error, match=re.escape(message)):
        attention_pool(**good | changes)
    attention_pool(**good)


BAD_SEQUENCES = {
    "tokens is no tensor": ({"tokens": [[1.0]]}, TypeError, "tokens must be a tensor, got list"),
    "tokens is empty": ({"tokens": torch.zeros(2, 0, 4)}, ValueError, "tokens must not be empty in T"),
    "tokens is of integers": ({"tokens": torch.zeros(2, 20, 4).long()}, TypeError, "tokens must be a floating-point tensor"),
    "slots have another width": ({"slots": torch.zeros(2, 3, 5)}, ValueError, "must have shape (B=2, K, d=4), got"),
    "slots have another dtype": ({"slots": torch.zeros(2, 3, 4).half()}, TypeError, "slots must have the dtype of tokens"),
    "w_q is a vector": ({"w_q": torch.zeros(4)}, ValueError, "w_q must have shape (d_k, d=4), got (4,)"),
    "w_k has another dtype": ({"w_k": torch.zeros(3, 4).double()}, TypeError, "w_k must have the dtype of tokens"),
    "window is a number": ({"window": 50}, TypeError, "window must be a WindowSpec, got int"),
    "window never writes": ({"window": WindowSpec(3, 7, None)}, ValueError, "window must have a stride"),
    "first_write is negative": ({"first_write": -1}, ValueError, "first_write must be at least 0, got -1"),
    "n_writes is zero": ({"n_writes": 0}, ValueError, "n_writes must be at least 1, got 0"),
    "n_writes is no int": ({"n_writes": True}, TypeError, "n_writes must be an int, got True"),
    "write_group is zero": ({"write_group": 0}, ValueError, "write_group must be at least 1, got 0"),
    "first_step is no int": ({"first_step": 0.5}, TypeError, "first_step must be an int, got 0.5"),
    "first_slot is no int": ({"first_slot": None}, TypeError, "first_slot must be an int, got None"),
    "tokens end before the last write": ({"n_writes": 5}, ValueError, "tokens must hold the steps 4..20 of"),
    "tokens start after the first write": ({"first_step": 5}, ValueError, "must hold the steps 4..16 of the first to"),
    "dropout_mask has another shape": ({"dropout_mask": torch.ones(2, 4, 7)}, ValueError, "(B=2, n_writes=4, W=10)"),
    "the backend is unknown": ({"backend": "cuda"}, ValueError, "backend must be one of triton, blocked, reference"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_SEQUENCES)
def test_bad_arguments_for_sequences_are_named(bad):
    changes, error, message = BAD_SEQUENCES[bad]
    good = {"tokens": torch.ones(2, 20, 4), "slots": torch.ones(2, 3, 4), "w_q": torch.ones(3, 4), "w_k": torch.ones(3, 4)}
    good |= {"window": SMALL, "first_write": 0, "n_writes": 4}
    with pytest.raises(error, match=re.escape(message)):
        attention_pool_sequence(**good | changes)
    attention_pool_sequence(**good)
