"""Which implementation of an operation runs, and why.

Three backends exist. ``reference`` is the definition in plain PyTorch; ``blocked`` is fast PyTorch on any device, with its own
backward; ``triton`` is the fused GPU kernel, which runs on a CPU only in Triton's interpreter (``TRITON_INTERPRET=1``).

The choice for one call, first match wins: the ``backend=`` argument, ``use_backend(...)``, then the automatic rule: ``triton``
for CUDA tensors that the operation has a kernel for, ``blocked`` for all others. ``last_choice(op)`` tells what was chosen.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from smt_kernels.launch import compute_capability

BACKENDS = ("triton", "blocked", "reference")

# Operations with a Triton kernel, and the longest last dimension of its tensors (None: any). Others run blocked everywhere.
TRITON_LIMITS: dict[str, int | None] = {
    "attention_pool": None,
    "attention_pool_sequence": None,
    "linear_cross_entropy": None,
    "stream_attention": 256,
    "stream_attention_decode": 256,
    "stride_memory": None,
    "stride_write": None,
    "window_attention": 256,
}
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where bfloat16 products begin, and shared memory for the blocks of the launch tables.
LEAST_CAPABILITY = (8, 0)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class BackendChoice:
    """One decision: the operation, the backend that runs it and the reason in words."""

    operation: str
    backend: str
    reason: str


_override: ContextVar[str | None] = ContextVar("smt_kernels backend", default=None)
_override_of_compiled: str | None = None  # of the latest ``use_backend`` of any thread; old compilers trace no ContextVar


class _Latest:
    """The latest choice of each operation, an attribute each: compiled code that sets an entry of a dict is compiled anew
    whenever another operation has added one."""


_last = _Latest()


class use_backend:
    """Run every operation on ``name`` from now on, or inside a ``with`` block; ``None`` returns to the automatic choice.

    It holds in the thread, or the asynchronous task, that says so; only what ``torch.compile`` makes follows the latest one of
    any thread. On a CPU, ``triton`` means Triton's interpreter, which ``smt_kernels.testing.interpreter`` mends for the whole
    process: right, but thousands of times slower than ``blocked``.

    Raises:
        ValueError: ``name`` is not one of ``BACKENDS`` or None.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            _check_name(name)
        self._previous = _current_override()
        _set_override(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        _set_override(self._previous)


def _current_override() -> str | None:
    return _override_of_compiled if torch.compiler.is_compiling() else _override.get()


def _set_override(name: str | None) -> None:
    global _override_of_compiled
    _override_of_compiled = name
    if not torch.compiler.is_compiling():
        _override.set(name)


def last_choice(operation: str) -> BackendChoice | None:
    """The backend that the latest call of ``operation`` used and why; None before the first call."""
    return getattr(_last, operation, None)


def automatic_choice(operation: str, tensor: Tensor) -> BackendChoice:
    """The backend that a call of ``operation`` on inputs like ``tensor`` would use without an override, and why."""
    return _decide(operation, tensor.device, tensor.dtype, tensor.shape[-1])


def choose(operation: str, tensor: Tensor, requested: str | None, *, obstacle: str | None = None) -> str:
    """Decide the backend for one call of ``operation`` on inputs like ``tensor``, and remember why.

    ``obstacle`` says why this call, unlike others of the operation, cannot run its kernel; None: nothing stands against it.

    Raises:
        ValueError: an unknown backend was asked for, or ``triton`` where nothing can run the operation's kernel.
        TypeError: ``triton`` was asked for with a dtype that the kernel does not take.
    """
    # Compilers see through caches, and warn; and to tracers a size may be a symbol, which no cache takes.
    traced = torch.compiler.is_compiling() or type(tensor.shape[-1]) is not int
    decide = _decide if traced else _remembered
    choice = decide(operation, tensor.device, tensor.dtype, tensor.shape[-1], requested, _current_override(), obstacle)
    setattr(_last, operation, choice)
    return choice.backend


def _decide(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    requested: str | None = None,
    override: str | None = None,
    obstacle: str | None = None,
) -> BackendChoice:
    wanted, source = (requested, "the backend argument") if requested is not None else (override, "use_backend")
    obstacle = _triton_obstacle(operation, device, dtype, width) or obstacle
    if wanted is not None:
        _check_name(wanted)
        if wanted == "triton" and obstacle is not None:
            error = TypeError if dtype not in TRITON_DTYPES else ValueError
            raise error(f"backend 'triton' was asked for by {source}, but {obstacle}")
        return BackendChoice(operation, wanted, f"asked for by {source}")
    if device.type != "cuda":
        reason = f"the tensors are on {device.type}, and Triton kernels are for CUDA devices"
        return BackendChoice(operation, "blocked", reason)
    if obstacle is not None:
        return BackendChoice(operation, "blocked", obstacle)
    return BackendChoice(operation, "triton", "CUDA tensors that the kernel takes")


_remembered = functools.lru_cache(maxsize=256)(_decide)


def _triton_obstacle(operation: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    if dtype not in TRITON_DTYPES:
        return f"dtype {dtype} is not one that its kernel takes: {', '.join(map(str, TRITON_DTYPES))}"
    longest = TRITON_LIMITS[operation]
    if longest is not None and width > longest:
        return f"its kernel takes a last dimension of at most {longest}, got {width}"
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if device.type == "cuda":
        capability = compute_capability(device)
        if torch.version.hip is None and capability < LEAST_CAPABILITY:
            return f"compute capability {_version(capability)}; kernels need {_version(LEAST_CAPABILITY)}"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        where = f"the tensors are on {device.type}"
        return f"{where}; set TRITON_INTERPRET=1 before the first import of triton to run its interpreter"
    return None


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
