"""Triton's interpreter with correct bfloat16 and conditions, and fast enough to test. Import it to have both.

The interpreter of triton 3.6 to 3.9 holds bfloat16 as its uint16 bit pattern. Left alone, ``tl.dot`` and arithmetic compute
with the *patterns*, silently, and casts to bfloat16 truncate. After ``import smt_kernels.testing.interpreter``:

- ``tl.dot`` of bfloat16 equals the fp32 dot of the decoded values; fp16 operands are widened too, which makes it faster;
- casts to bfloat16, and results of bfloat16 arithmetic, round to nearest even, as on a GPU;
- a reduction or scan over bfloat16 raises, because a GPU's result would depend on an order that nothing here can know;
- a scalar condition, compared or loaded, is an int1, and can be combined with masks;
- ``tl.sum`` adds pairs of partial sums in either direction, as a GPU does, where columns were added one by one;
- ``tl.reduce`` and ``tl.associative_scan`` with a combine function of one's own make one call per slice, not one per element;
- ``triton.language`` is patched once per launch and module, where each call from one jit function to another took as long;
- types and shapes of values are made once (``smt_kernels.testing.quick_interpreter``).

Raises:
    RuntimeError: at import, unless ``TRITON_INTERPRET=1`` was set, which must happen before the first import of triton.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError(
        "smt_kernels.testing.interpreter needs TRITON_INTERPRET=1, set before the first import of triton; "
        f"got TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')!r}"
    )

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    ReduceOps,
    ReduceScanOpInterface,
    ScanOps,
    TensorHandle,
    _ir,
)

from smt_kernels.testing import quick_interpreter  # noqa: F401  (slow without it)


def decode_bfloat16(patterns: np.ndarray) -> np.ndarray:
    """The fp32 values of bfloat16 bit patterns (uint16)."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def encode_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bfloat16 bit patterns (uint16) nearest to fp32 values, ties to even; overflow gives infinity."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Adding just under half of the dropped range, plus one where the kept part is odd, carries exactly when rounding goes up.
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    """The handle in fp32 if it holds bfloat16 or fp16; any other as it is."""
    if _is_bfloat16(handle):
        return TensorHandle(decode_bfloat16(handle.data), tl.float32)
    if isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.float16:
        return TensorHandle(handle.data.astype(np.float32), tl.float32)
    return handle


def _narrow(data: np.ndarray) -> TensorHandle:
    return TensorHandle(encode_bfloat16(data.astype(np.float32, copy=False)), tl.bfloat16)


def _replaces(owner: type, *names: str) -> Callable:
    """Install the decorated ``method(original, self, ...)`` in the place of each method of ``owner`` called ``names``."""

    def install(method: Callable) -> Callable:
        for name in names:
            original = getattr(owner, name)
            setattr(owner, name, lambda self, *args, _original=original, **kwargs: method(_original, self, *args, **kwargs))
        return method

    return install


@_replaces(InterpreterBuilder, "cast_impl")
def _cast(original: Callable, self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    if target.scalar == tl.bfloat16 and not _is_bfloat16(source):
        return _narrow(source.data)
    if target.scalar != tl.bfloat16 and _is_bfloat16(source):
        source = _widen(source)
    return original(self, source, target)


@_replaces(InterpreterBuilder, "create_fp_to_fp")
def _cast_with_rounding(
    original: Callable, self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, rounding: Any
) -> TensorHandle:
    nearest = rounding is None or rounding == _ir.ROUNDING_MODE.RTNE
    if target.scalar == tl.bfloat16 and nearest and not _is_bfloat16(source):
        return _narrow(_widen(source).data)
    return original(self, source, target, rounding)


def _constant(self: InterpreterBuilder, value: float) -> TensorHandle:
    return _narrow(np.array([value], dtype=np.float32))


InterpreterBuilder.get_bf16 = _constant  # triton 3.6 has none


@_replaces(InterpreterBuilder, "create_dot")
def _dot(original: Callable, self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return original(self, _widen(a), _widen(b), *rest)


@_replaces(InterpreterBuilder, "binary_op", "unary_op", "create_fma", "create_clampf")
def _arithmetic(original: Callable, self: InterpreterBuilder, *operands: Any) -> TensorHandle:
    rounded = any(_is_bfloat16(operand) for operand in operands)
    result = original(self, *(map(_widen, operands) if rounded else operands))
    if result.data.dtype == np.bool_:  # of a comparison, which else keeps the dtype of its operands, and is cast to it
        return TensorHandle(result.data, tl.int1)
    return _narrow(result.data) if rounded else result


@_replaces(ReduceOps, "apply_impl")
@_replaces(ScanOps, "apply_impl")
def _refuse_bfloat16(original: Callable, self: ReduceScanOpInterface, operands: Any) -> Any:
    for operand in operands if isinstance(operands, tuple) else (operands,):
        if operand.dtype.scalar == tl.bfloat16:
            raise TypeError("a reduction or scan over bfloat16 has no defined order of rounding: cast to fp32 before it")
    return original(self, operands)


@_replaces(ReduceOps, "sum")
def _sum(original: Callable, self: ReduceOps, operand: Any) -> Any:
    if self.axis is None:
        return original(self, operand)
    # NumPy adds in pairs along the last dimension of contiguous memory only.
    sums = np.ascontiguousarray(np.moveaxis(operand.handle.data, self.axis, -1)).sum(axis=-1)
    return self.to_tensor(np.expand_dims(sums, self.axis) if self.keep_dims else sums, operand.dtype)


def _combine_slices(self: ReduceScanOpInterface, operands: tuple, axis: int) -> list[list[np.ndarray]]:
    """Running results of the combine function along ``axis``, one list of arrays (the axis removed) per step."""
    data = [operand.handle.data for operand in operands]
    dtypes = [operand.dtype for operand in operands]
    shape = [size for dim, size in enumerate(data[0].shape) if dim != axis]

    def step(index: int) -> tuple:
        slices = (np.take(array, index, axis=axis) for array in data)
        return tuple(self.to_tensor(array, dtype) for array, dtype in zip(slices, dtypes, strict=True))

    running, history = step(0), []
    for index in range(data[0].shape[axis]):
        if index > 0:
            result = self.combine_fn.fn(*running, *step(index))
            running = result if isinstance(result, tuple) else (result,)
        history.append([np.asarray(part.handle.data).reshape(shape) for part in running])
    return history


@_replaces(ScanOps, "generic_scan")
def _scan(original: Callable, self: ScanOps, operands: tuple) -> list:
    axis = self.axis % operands[0].handle.data.ndim
    steps = _combine_slices(self, operands, axis)
    return [
        self.to_tensor(np.stack([step[part] for step in steps], axis=axis), operand.dtype)
        for part, operand in enumerate(operands)
    ]


@_replaces(ReduceOps, "generic_reduce")
def _reduce(original: Callable, self: ReduceOps, operands: tuple) -> list:
    if self.axis is None or operands[0].handle.data.ndim < 2:
        return original(self, operands)
    axis = self.axis % operands[0].handle.data.ndim
    final = _combine_slices(self, operands, axis)[-1]
    if self.keep_dims:
        final = [np.expand_dims(part, axis) for part in final]
    return [self.to_tensor(part, operand.dtype) for part, operand in zip(final, operands, strict=True)]


_patched_modules: set[str] = set()  # in the launch that is running


@_replaces(GridExecutor, "__call__")
def _launch(original: Callable, self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
    _patched_modules.clear()
    return original(self, *args, **kwargs)


@_replaces(InterpretedFunction, "__call__")
def _call(original: Callable, self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    # What is patched depends on the module of the function alone, and lasts for the launch.
    if self.fn.__module__ in _patched_modules:
        return self.rewrite()(*args, **kwargs)
    _patched_modules.add(self.fn.__module__)
    return original(self, *args, **kwargs)
