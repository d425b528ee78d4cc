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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("ampere", "hopper", "blackwell", "cdna", "interpreter")


@dataclass(frozen=True)
class LaunchSettings:
    """How one kernel is launched.

    ``head_chunk`` is how many of the head dimensions one program writes; the programs of one head each compute its scores, so
    memory and registers do not grow with the head. ``query_block`` is the most queries that are multiplied at a time and
    ``key_block`` the most keys.
    """

    num_warps: int
    head_chunk: int
    query_block: int = 64
    key_block: int = 64
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


# What launches have compiled: by kernel, device and all that Triton may specialise code for. Triton finds that out anew in
# every launch, which takes about 40 us on the host for a kernel of 40 arguments; here the compiled kernel is called.
_compiled: dict[tuple[Any, ...], Any] = {}
_MOST_COMPILED = 2**14  # entries that differ in sizes alone share their code, but not for ever the memory of their keys


def _launch_compiled(
    kernel: Any, grid: tuple[int, ...], index: int | None, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    open_names = _unspecialised(kernel)
    if open_names is None or kernel.pre_run_hooks:
        kernel[grid](*arguments, **named)
        return
    key = (
        kernel,
        index,
        *[_specialised(value) for value in arguments],
        *[
            name if name in open_names and type(value) is int and abs(value) < 2**31 else (name, _specialised(value))
            for name, value in named.items()
        ],
    )
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = kernel[grid](*arguments, **named)
        return
    ordered = *arguments, *[named[name] for name in kernel.arg_names[len(arguments) :]]
    compiled[(*grid, 1, 1)[:3]](*ordered)


def _specialised(value: Any) -> Any:
    """What compiled code may depend on: of a tensor its dtype and alignment, of all else the value."""
    return (value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value


@functools.cache
def _unspecialised(kernel: Any) -> frozenset[str] | None:
    """The integer parameters of a kernel that code does not depend on; None: it is interpreted, not compiled."""
    if not hasattr(kernel, "device_caches"):
        return None
    return frozenset(parameter.name for parameter in kernel.params if parameter.do_not_specialize)


@functools.cache
def _mend_interpreter() -> None:
    importlib.import_module("smt_kernels.testing.interpreter")
