"""Checks of the arguments of attention pooling, beyond those that operations share; errors say what came and what fits."""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels import checks
from smt_kernels.window import WindowSpec


def check_windows(windows: Tensor, n_memory: int, valid_memory: Tensor | None, valid_tokens: Tensor | None) -> None:
    checks.shape("windows", windows, {"N": None, "W": None, "d": None})
    checks.floating("windows", windows)
    n_windows, size, _ = windows.shape
    _check_int("n_memory", n_memory)
    if not 0 <= n_memory <= size:
        raise ValueError(f"n_memory must lie in 0..W = 0..{size}, got {n_memory}")
    total = 0
    for name, valid, upper in (("valid_memory", valid_memory, n_memory), ("valid_tokens", valid_tokens, size - n_memory)):
        if valid is not None:
            checks.counts(name, valid, n_windows, upper, windows)
        total = total + (upper if valid is None else valid)
    readable = isinstance(total, Tensor) and total.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and bool((total == 0).any()):
        empty = (total == 0).nonzero().flatten().tolist()
        raise ValueError(f"valid_memory + valid_tokens must be at least 1 in every window, got 0 in windows {empty}")


def check_projections(model_name: str, model: Tensor, w_q: Tensor, w_k: Tensor) -> None:
    checks.shape("w_q", w_q, {"d_k": None, "d": model.shape[-1]})
    checks.shape("w_k", w_k, {"d_k": w_q.shape[0], "d": model.shape[-1]})
    checks.like("w_q", w_q, model_name, model)
    checks.like("w_k", w_k, model_name, model)


def check_dropout(model_name: str, model: Tensor, dropout_mask: Tensor | None, expected: dict[str, int]) -> None:
    if dropout_mask is not None:
        checks.shape("dropout_mask", dropout_mask, expected)
        checks.like("dropout_mask", dropout_mask, model_name, model)


def check_timeline(
    window: WindowSpec, first_write: int, n_writes: int, write_group: int, first_step: int, first_slot: int, length: int
) -> None:
    if not isinstance(window, WindowSpec):
        raise TypeError(f"window must be a WindowSpec, got {type(window).__name__}")
    if window.stride is None:
        raise ValueError(f"window must have a stride, for writes to happen, got {window}")
    for name, value, least in (("first_write", first_write, 0), ("n_writes", n_writes, 1), ("write_group", write_group, 1)):
        _check_int(name, value)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    _check_int("first_step", first_step)
    _check_int("first_slot", first_slot)
    first, last = window.write_step(first_write), window.write_step(first_write + n_writes - 1)
    if not first_step <= first <= last < first_step + length:
        held = f"{first_step}..{first_step + length - 1}"
        raise ValueError(
            f"tokens must hold the steps {first}..{last} of the first to the last write, got {held} (first_step = {first_step})"
        )


def _check_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
