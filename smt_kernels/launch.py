"""How Triton kernels are launched: settings as data, one table per operation, chosen by architecture and head size.

The shapes of this package are fixed by the window, so committed tables replace autotuning: the first call is as fast as the
second, and two machines of one architecture compute the same bits. The attentions keep their table in ``settings.py``, the
others a rule beside their launches. The figures are chosen from ahead-of-time compilation (``smt_kernels.testing.aot``) for
bf16, by these rules in order: no register spills; shared memory within what the smallest chip of the family has; most programs
resident per multiprocessor, so that one loads while another multiplies; most warps; the largest blocks. They hold for the
compilers of triton 3.6 to 3.9. What was timed on a GPU, a comment in its table says; all else is chosen by rule.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("ampere", "hopper", "blackwell", "cdna", "interpreter")


@dataclass(frozen=True)
class LaunchSettings:
    """How one kernel is launched.

    ``head_chunk`` is how many of the head dimensions one program writes; the programs of one head each compute its scores, so
    memory and registers do not grow with the head. ``query_block`` is the most queries that are multiplied at a time,
    ``key_block`` the most keys, and ``slot_block`` the most slots where these are another sequence.
    """

    num_warps: int
    head_chunk: int
    query_block: int = 64
    key_block: int = 64
    slot_block: int = 32
    num_stages: int = 1

    @functools.cached_property
    def options(self) -> dict[str, int | bool]:
        return compiler_options(self.num_warps, self.num_stages)


# Head sizes, padded to a power of two, that tables have settings for.
HEADS = (16, 32, 64, 128, 256)

# Settings per (kernel, family, bytes of an element): one for each of HEADS.
Table = dict[tuple[str, str, int], tuple[LaunchSettings, ...]]


def compiler_options(num_warps: int, num_stages: int) -> dict[str, int | bool]:
    """The compiler options, as keyword arguments of a launch."""
    # Fused multiply-adds are asked for because the default is about to differ between versions of Triton.
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


# Triton's own of the next two are functions of its language, a call of which takes the host as long as forming three views.


def ceil_div(size: int, block: int) -> int:
    """How many blocks hold ``size`` entries."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The next one, from 1 on, that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def padded_size(size: int) -> int:
    """The block that holds ``size`` entries: the next power of two, and at least 16, the least that a dot takes."""
    return max(16, power_of_two(size))


def compute_capability(device: torch.device) -> tuple[int, int]:
    """That of a CUDA device, asked for once."""
    return _capability(device)


# As ``torch.compiler.assume_constant_result`` marks it, without importing the compiler, and Triton with it, which takes as long
# as importing PyTorch.
compute_capability._dynamo_marked_constant = True
_capability = functools.cache(torch.cuda.get_device_capability)


def architecture_family(device: torch.device) -> str:
    """The family of ``device``, one of ``FAMILIES``; on a CPU kernels are interpreted."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "cdna"
    # Compute capability 12 (consumer Blackwell) has the matrix instructions and the shared memory of capability 8.
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(compute_capability(device)[0], "ampere")


def head_settings(table: Table, kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> LaunchSettings:
    """Settings of ``kernel`` in ``table`` for heads of ``head_dim`` in ``dtype`` on ``device``.

    Raises:
        ValueError: the head is longer than any in the table.
    """
    if head_dim > HEADS[-1]:
        raise ValueError(f"head size must be at most {HEADS[-1]} for {kernel}, got {head_dim}")
    return table[kernel, architecture_family(device), dtype.itemsize][HEADS.index(padded_size(head_dim))]


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **named: Any) -> None:
    """Launch a Triton ``kernel`` on ``device``, whichever device is current; on a CPU, in the mended interpreter.

    Args:
        arguments, named: the kernel's, and options of the compiler by name: tensors, numbers, strings, None, tuples of numbers.
    """
    if device.type == "cpu":
        _mend_interpreter()
    if device.type != "cuda":
        kernel[grid](*arguments, **named)
    elif device.index == torch.cuda.current_device():
        _launch_compiled(kernel, grid, device.index, arguments, named)
    else:
        with torch.cuda.device(device):
            _launch_compiled(kernel, grid, device.index, arguments, named)


class _Calls:
    """The launches of one kernel with arguments of the same names: where in them to look, and what they have compiled.

    Triton finds out anew in every launch what its code depends on, which takes about 40 us on the host for a kernel of 40
    arguments. Here it is looked up: by the dtype and alignment of what is a tensor, not at all for integers that code does not
    depend on (``free``), unless they need 64 bits, and by value for all else.
    """

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        tensors = [name for name, value in named.items() if value is None or isinstance(value, Tensor)]
        self.kernel = kernel  # whose identity is a key
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.ordered = _getter(kernel.arg_names[len(arguments) :])
        self.tensors, self.free = _getter(tensors), _getter([name for name in named if name in free])
        self.fixed = _getter([name for name in named if name not in free and name not in tensors])


_calls: dict[tuple[Any, ...], _Calls] = {}
_MOST_COMPILED = 2**14  # entries that differ in sizes alone share their code, but not for ever the memory of their keys


def _launch_compiled(
    kernel: Any, grid: tuple[int, ...], index: int | None, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    # Interpreted, not to be called without its hooks, or compiled by ROCm for the size of a tensor's storage, too.
    if not hasattr(kernel, "device_caches") or kernel.pre_run_hooks or torch.version.hip:
        kernel[grid](*arguments, **named)
        return
    place = id(kernel), len(arguments), *named
    calls = _calls.get(place)
    if calls is None:
        calls = _calls[place] = _Calls(kernel, arguments, named)
    key = (
        index,
        calls.fixed(named),
        *[(v.dtype, v.data_ptr() % 16) if isinstance(v, Tensor) else v for v in (*arguments, *calls.tensors(named))],
        *[(type(value) is int and -(2**31) <= value < 2**31) or (type(value), value) for value in calls.free(named)],
    )
    compiled = calls.compiled.get(key)
    if compiled is None:
        if len(calls.compiled) >= _MOST_COMPILED:
            calls.compiled.clear()
        calls.compiled[key] = kernel[grid](*arguments, **named)
        return
    compiled[(*grid, 1, 1)[:3]](*arguments, *calls.ordered(named))


def _getter(names: list[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """The values of ``names`` in a dict, as a tuple."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda named: tuple(named[name] for name in names)


@functools.cache
def _mend_interpreter() -> None:
    importlib.import_module("smt_kernels.testing.interpreter")
