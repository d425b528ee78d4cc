"""What an interpreted Triton kernel asks of memory and matrix units: bytes per argument, dot FLOPs, races, wild accesses.

    with count_traffic() as traffic:
        forward(q, k, v, ...)
    traffic.read["k"], traffic.written["out"], traffic.dot_flops

Bytes are those *requested* by unmasked lanes: reading an element twice counts twice, which a cache may or may not hide.
Arguments are known by the parameter names of the kernel; ``None`` arguments and scalars move no bytes.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

import smt_kernels.testing.interpreter  # noqa: F401  (without it bfloat16 is wrong, and this file is of no use natively)


@dataclass
class Launch:
    """One launch: the kernel's name, its grid, the bytes that it requests and the FLOPs of its dots."""

    kernel: str
    grid: tuple[int, ...]
    bytes: int = 0
    dot_flops: int = 0


@dataclass
class Traffic:
    """Counts over all launches inside ``count_traffic``, by the kernels' argument names where they are dictionaries.

    ``read``, ``written``: bytes requested. ``dot_flops``: 2 M N K summed over ``tl.dot``. ``launches``: in order.
    ``atomics``: atomic operations, which make results depend on the order of programs. ``raced``: bytes per argument that
    one program of a launch wrote and another read or wrote. ``addresses``: where the tensors given to the kernels start.
    """

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    raced: Counter[str] = field(default_factory=Counter)
    dot_flops: int = 0
    atomics: int = 0
    launches: list[Launch] = field(default_factory=list)
    addresses: set[int] = field(default_factory=set)

    @property
    def bytes(self) -> int:
        """All bytes requested, read and written."""
        return self.read.total() + self.written.total()


class _Argument:
    """The exact set of addresses that one tensor argument owns, and the first and last program to use each of its elements.

    A strided view owns none of the gaps between its rows.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.start = tensor.data_ptr()
        self.itemsize = tensor.element_size()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        owned = torch.zeros(extent, dtype=torch.bool)
        owned.as_strided(tensor.shape, tensor.stride()).fill_(True)
        self.owned = owned.numpy()
        self.stop = self.start + extent * self.itemsize
        self.first = np.full(extent, np.iinfo(np.int64).max)
        self.last = np.full(extent, -1)
        self.written = np.zeros(extent, dtype=bool)

    def elements(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The elements at byte addresses (int64), and which of these are elements of this tensor."""
        elements, rest = np.divmod(addresses - self.start, self.itemsize)
        inside = (elements >= 0) & (elements < len(self.owned)) & (rest == 0)
        return elements, inside & self.owned[np.where(inside, elements, 0)]

    def use(self, elements: np.ndarray, program: int, *, write: bool) -> None:
        """Note that ``program`` reads or writes ``elements``."""
        self.first[elements] = np.minimum(self.first[elements], program)
        self.last[elements] = np.maximum(self.last[elements], program)
        if write:
            self.written[elements] = True

    def raced(self) -> int:
        """Bytes that one program wrote and another read or wrote."""
        return int((self.written & (self.first < self.last)).sum()) * self.itemsize


class _Recorder:
    def __init__(self) -> None:
        self.traffic = Traffic()
        self.arguments: list[_Argument] = []
        # Every tensor that a kernel got: were one freed, a later one could start there, and pass for it.
        self.kept: list[Tensor] = []

    def begin(self, kernel: str, names: list[str], arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
        tensors = {name: arguments[name] for name in names if isinstance(arguments.get(name), Tensor)}
        self.kept += tensors.values()
        self.arguments = [_Argument(name, tensor) for name, tensor in tensors.items() if tensor.numel()]
        self.traffic.addresses.update(argument.start for argument in self.arguments)
        self.traffic.launches.append(Launch(kernel, grid))

    def access(self, builder: InterpreterBuilder, pointers: Any, mask: Any, *, write: bool) -> None:
        addresses = pointers.data[np.broadcast_to(np.asarray(mask, dtype=bool), pointers.data.shape)].astype(np.int64)
        if not addresses.size:
            return
        action, lowest, highest = "write" if write else "read", addresses.min(), addresses.max()
        for argument in self.arguments:
            if highest < argument.start or lowest >= argument.stop:
                continue
            elements, owned = argument.elements(addresses)
            if owned.all():
                break
            if owned.any():
                raise IndexError(f"{action} outside {argument.name!r} by program {builder.grid_idx}")
        else:
            raise IndexError(f"{action} outside every tensor argument by program {builder.grid_idx}")
        (self.traffic.written if write else self.traffic.read)[argument.name] += addresses.size * argument.itemsize
        self.traffic.launches[-1].bytes += addresses.size * argument.itemsize
        _, height, depth = builder.grid_dim
        x, y, z = builder.grid_idx
        argument.use(elements, (x * height + y) * depth + z, write=write)

    def end(self) -> None:
        for argument in self.arguments:
            if raced := argument.raced():
                self.traffic.raced[argument.name] += raced


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what every kernel launched inside the block does; see the module docstring.

    Raises:
        triton.runtime.errors.InterpreterError: from the launch, naming IndexError, the argument and the program, when a kernel
            reads or writes an address that belongs to none of its tensor arguments. The access is not made.
    """
    recorder = _Recorder()
    originals: list[tuple[type, str, Callable]] = []

    def replace(owner: type, name: str, make: Callable[[Callable], Callable]) -> None:
        if hasattr(owner, name):
            original = getattr(owner, name)
            originals.append((owner, name, original))
            setattr(owner, name, make(original))

    def launch(original: Callable) -> Callable:
        def counted(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
            grid = self.grid if isinstance(self.grid, tuple) else ()
            recorder.begin(self.fn.__name__, self.arg_names, arguments, grid)
            result = original(self, *args, **kwargs)
            recorder.end()
            return result

        return counted

    def load(original: Callable) -> Callable:
        def counted(self: InterpreterBuilder, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            recorder.access(self, pointers, mask.data, write=False)
            return original(self, pointers, mask, *rest, **named)

        return counted

    def store(original: Callable) -> Callable:
        def counted(self: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            recorder.access(self, pointers, mask.data, write=True)
            return original(self, pointers, value, mask, *rest, **named)

        return counted

    def dot(original: Callable) -> Callable:
        def counted(self: InterpreterBuilder, a: Any, b: Any, *rest: Any, **named: Any) -> Any:
            flops = 2 * int(np.prod(a.data.shape)) * b.data.shape[-1]
            recorder.traffic.dot_flops += flops
            recorder.traffic.launches[-1].dot_flops += flops
            return original(self, a, b, *rest, **named)

        return counted

    def atomic(original: Callable) -> Callable:
        def counted(self: InterpreterBuilder, *args: Any, **named: Any) -> Any:
            recorder.traffic.atomics += 1
            return original(self, *args, **named)

        return counted

    replace(GridExecutor, "__call__", launch)
    replace(InterpreterBuilder, "create_masked_load", load)
    replace(InterpreterBuilder, "create_masked_store", store)
    replace(InterpreterBuilder, "create_dot", dot)
    replace(InterpreterBuilder, "create_atomic_rmw", atomic)
    replace(InterpreterBuilder, "create_atomic_cas", atomic)
    try:
        yield recorder.traffic
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
