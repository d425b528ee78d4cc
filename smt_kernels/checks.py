"""Checks of operation arguments: each error names the argument, what came and what is expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape(name: str, tensor: Tensor, expected: dict[str, int | None], *, may_be_empty: tuple[str, ...] = ()) -> None:
    """Check that ``tensor`` has one dimension per entry of ``expected``, of that size (None: any) and not empty.

    Raises:
        TypeError: not a tensor, or a nested or sparse one.
        ValueError: another rank or size, or an empty dimension that is not in ``may_be_empty``.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
    sizes = tensor.shape
    # Not ``want in (None, got)``: to compilers of torch 2.10 no number is in a tuple of numbers that vary.
    fits = len(sizes) == len(expected) and all(
        want is None or want == got for got, want in zip(sizes, expected.values(), strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {_described(expected)}, got {tuple(sizes)}")
    if 0 in sizes:
        for dim, size in zip(expected, sizes, strict=True):
            if size == 0 and dim not in may_be_empty:
                raise ValueError(f"{name} must not be empty in {dim}: expected {_described(expected)}, got {tuple(sizes)}")


def _described(expected: dict[str, int | None]) -> str:
    return "(" + ", ".join(dim if size is None else f"{dim}={size}" for dim, size in expected.items()) + ")"


def floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is float16, bfloat16, float32 or float64."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be a floating-point tensor ({', '.join(map(str, FLOATING))}), got {tensor.dtype}")


def like(name: str, tensor: Tensor, model_name: str, model: Tensor, *, dtype: bool = True) -> None:
    """Check that ``tensor`` is on the device, and if ``dtype`` of the dtype, of ``model``.

    Raises:
        TypeError: another dtype.
        ValueError: another device.
    """
    if dtype and tensor.dtype != model.dtype:
        raise TypeError(f"{name} must have the dtype of {model_name}, {model.dtype}, got {tensor.dtype}")
    if tensor.device != model.device:
        raise ValueError(f"{name} must be on the device of {model_name}, {model.device}, got {tensor.device}")


def integer(name: str, value: int) -> None:
    """Raise TypeError unless ``value`` is an int (or one of a compiler that traces), and not a bool."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")


def number(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        TypeError: not a number, such as a tensor, which would lose its gradient, or a bool.
        ValueError: not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if isinstance(value, (int, float)) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def head_groups(n_query_heads: int, n_kv_heads: int) -> None:
    """Raise ValueError unless the query heads are a multiple of the key/value heads (grouped-query attention)."""
    if n_query_heads % n_kv_heads:
        raise ValueError(f"q has {n_query_heads} heads, which is not a multiple of the {n_kv_heads} heads of k and v")


def readable(tensor: Tensor) -> bool:
    """Whether reading values waits for nothing: they are on the CPU, and no compiler or mode of fake tensors hides them."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def counts(name: str, tensor: Tensor, rows: int, upper: int, model: Tensor, *, dim: str = "N") -> None:
    """Check a per-row count: int32 of shape (``dim``=rows,) on the device of ``model``; on CPU also that it lies in 0..upper.

    On other devices the range is not read, since that would wait for the device.
    """
    shape(name, tensor, {dim: rows})
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {tensor.dtype}")
    if tensor.device != model.device:
        raise ValueError(f"{name} must be on {model.device}, got {tensor.device}")
    if readable(tensor):
        values = tensor.tolist()
        if min(values) < 0 or max(values) > upper:
            raise ValueError(f"{name} must lie in 0..{upper}, got {values}")


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with unit stride in their last dimension, if they have one, copied only where they have another."""
    return tuple(t if t.ndim == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors)
