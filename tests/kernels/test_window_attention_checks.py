"""What window attention refuses, by name."""

from __future__ import annotations

import re

import pytest
import torch

from smt_kernels import window_attention


def good_arguments() -> dict[str, object]:
    q, k, v = torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 2, 8), torch.zeros(2, 6, 2, 8)
    counts = torch.tensor([0, 2], dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "n_memory": 2, "valid_memory": counts, "valid_tokens": counts, "tail": None}


BAD_ARGUMENTS = {
    "q is no tensor": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "q has three dimensions": ({"q": torch.zeros(6, 4, 8)}, ValueError, "q must have shape (N, W, H, D), got (6, 4, 8)"),
    "q is of integers": ({"q": torch.zeros(2, 6, 4, 8, dtype=torch.int32)}, TypeError, "q must be a floating-point tensor"),
    "q is empty": ({"q": torch.zeros(2, 6, 0, 8)}, ValueError, "q must not be empty in H"),
    "q is neither whole nor a tail": ({"q": torch.zeros(2, 3, 4, 8)}, ValueError, "q must hold W = 6 entries per window, got"),
    "q is not the tail asked for": (
        {"q": torch.zeros(2, 3, 4, 8), "tail": 2}, ValueError, "q must hold W = 6 or tail = 2 entries per window, got 3",
    ),
    "k has other windows": ({"k": torch.zeros(3, 6, 2, 8)}, ValueError, "(N=2, W, H_kv, D=8), got (3, 6, 2, 8)"),
    "k has another head size": ({"k": torch.zeros(2, 6, 2, 4)}, ValueError, "k must have shape (N=2, W, H_kv, D=8)"),
    "k has another dtype": ({"k": torch.zeros(2, 6, 2, 8).half()}, TypeError, "k must have the dtype of q, torch.float32"),
    "v has another length": ({"v": torch.zeros(2, 5, 2, 8)}, ValueError, "v must have shape (N=2, W=6, H_kv=2, D=8)"),
    "v is on another device": (
        {"v": torch.zeros(2, 6, 2, 8, device="meta")}, ValueError, "v must be on the device of q, cpu, got meta",
    ),
    "heads do not divide": (
        {name: torch.zeros(2, 6, 3, 8) for name in "kv"}, ValueError, "q has 4 heads, which is not a multiple of the 3",
    ),
    "the window is too long": (
        {name: torch.zeros(2, 129, 2, 8) for name in "qkv"}, ValueError, "a window holds at most 128 entries, got W = 129",
    ),
    "tail is no int": ({"tail": 2.0}, TypeError, "tail must be an int, got 2.0"),
    "n_memory is no int": ({"n_memory": 2.0, "backend": "triton"}, TypeError, "n_memory must be an int, got 2.0"),
    "tail is zero": ({"tail": 0}, ValueError, "tail must lie in 1..W = 1..6, got 0"),
    "tail is too long": ({"tail": 7}, ValueError, "tail must lie in 1..W = 1..6, got 7"),
    "n_memory is negative": ({"n_memory": -1}, ValueError, "n_memory must lie in 0..W = 0..6, got -1"),
    "n_memory is too large": ({"n_memory": 7}, ValueError, "n_memory must lie in 0..W = 0..6, got 7"),
    "counts are of another dtype": (
        {"valid_memory": torch.tensor([0, 2])}, TypeError, "valid_memory must be int32, got torch.int64",
    ),
    "counts are of another length": (
        {"valid_tokens": torch.zeros(3, dtype=torch.int32)}, ValueError, "valid_tokens must have shape (N=2), got (3,)",
    ),
    "counts are too large": (
        {"valid_memory": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, "valid_memory must lie in 0..2, got [0, 3]",
    ),
    "counts are on another device": (
        {"valid_tokens": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "valid_tokens must be on cpu, got meta",
    ),
    "counts are negative": (
        {"valid_tokens": torch.tensor([-1, 3], dtype=torch.int32)}, ValueError, "valid_tokens must lie in 0..4, got [-1, 3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_named(bad):
    changes, error, message = BAD_ARGUMENTS[bad]
    with pytest.raises(error, match=re.escape(message)):
        window_attention(**good_arguments() | changes)
    window_attention(**good_arguments())
