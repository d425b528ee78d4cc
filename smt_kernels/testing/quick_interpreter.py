"""Triton's interpreter without work that changes nothing. To import it is enough.

Most of the time of a small kernel goes to what comes out the same for every value or every launch, or is not looked at. Here
types and shapes of values are made once and looked up by name, what ``triton.language`` has to be patched is listed once, and
integers are not added a second time in 64 bits for an assertion that is made only where ``debug`` is on.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

ORIGINALS = {
    "block": tl.core.block_type.__init__,
    "tensor": tl.tensor.__init__,
    "equal": tl.dtype.__eq__,
    "np_dtype": interpreter._get_np_dtype,
}
_blocks: dict[tuple, dict[str, Any]] = {}  # attributes of a type, by its elements' type and its shape
_tensors: dict[str, dict[str, Any]] = {}  # attributes of a value, by its type
_np_dtypes: dict[str, Any] = {}


def _make_block(self: tl.core.block_type, element_ty: tl.dtype, shape: Any) -> None:
    key = element_ty.name, *[size.value if isinstance(size, tl.constexpr) else size for size in shape]
    if key not in _blocks:
        ORIGINALS["block"](self, element_ty, shape)
        _blocks[key] = vars(self).copy()
    self.__dict__.update(_blocks[key], element_ty=element_ty)


def _make_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    if type.name not in _tensors:
        ORIGINALS["tensor"](self, handle, type)
        _tensors[type.name] = vars(self).copy()
    self.__dict__.update(_tensors[type.name], handle=handle, type=type)


def _equal(self: tl.dtype, other: Any) -> bool:
    return self is other or ORIGINALS["equal"](self, other)


def _np_dtype(type: tl.dtype) -> Any:
    if type.name not in _np_dtypes:
        _np_dtypes[type.name] = ORIGINALS["np_dtype"](type)
    return _np_dtypes[type.name]


@functools.cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


tl.core.block_type.__init__, tl.tensor.__init__, tl.dtype.__eq__ = _make_block, _make_tensor, _equal
interpreter._get_np_dtype, interpreter._patch_builtin = _np_dtype, _patch_builtin
_options = interpreter.interpreter_builder.options
interpreter.interpreter_builder.options = dataclasses.replace(_options, sanitize_overflow=_options.debug)
