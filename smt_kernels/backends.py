"""Which implementation of an operation runs, and why.

Three backends exist. ``reference`` is the definition in plain PyTorch; ``blocked`` is fast PyTorch on any device, with its own
backward; ``triton`` is the fused GPU kernel, which runs on a CPU only in Triton's interpreter (``TRITON_INTERPRET=1``).

The choice for one call, first match wins: the ``backend=`` argument, ``use_backend(...)``, then the automatic rule: ``triton``
for CUDA tensors that the operation has a kernel for, ``blocked`` for all others. ``last_choice(op)`` tells what was chosen.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("triton", "blocked", "reference")

# Operations with a Triton kernel, and the longest last dimension of its tensors (None: any). Others run blocked everywhere.
TRITON_LIMITS: dict[str, int | None] = {
    "attention_pool": None,
    "attention_pool_sequence": None,
    "stream_attention": 256,
    "stream_attention_decode": 256,
    "stride_write": None,
    "window_attention": 256,
}
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class BackendChoice:
    """One decision: the operation, the backend that runs it and the reason in words."""

    operation: str
    backend: str
    reason: str


_override: str | None = None
_last: dict[str, BackendChoice] = {}


class use_backend:
    """Run every operation on ``name`` from now on, or inside a ``with`` block; ``None`` returns to the automatic choice.

    Raises:
        ValueError: ``name`` is not one of ``BACKENDS`` or None.
    """

    def __init__(self, name: str | None) -> None:
        global _override
        if name is not None:
            _check_name(name)
        self._previous = _override
        _override = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        global _override
        _override = self._previous


def last_choice(operation: str) -> BackendChoice | None:
    """The backend that the latest call of ``operation`` used and why; None before the first call."""
    return _last.get(operation)


def automatic_choice(operation: str, tensor: Tensor) -> BackendChoice:
    """The backend that a call of ``operation`` on inputs like ``tensor`` would use without an override, and why."""
    return _decide(operation, tensor, None, None)


def choose(operation: str, tensor: Tensor, requested: str | None, *, obstacle: str | None = None) -> str:
    """Decide the backend for one call of ``operation`` on inputs like ``tensor``, and remember why.

    ``obstacle`` says why this call, unlike others of the operation, cannot run its kernel; None: nothing stands against it.

    Raises:
        ValueError: an unknown backend was asked for, or ``triton`` where the operation has no kernel or nothing can run it.
        TypeError: ``triton`` was asked for with a dtype that the kernel does not take.
    """
    choice = _decide(operation, tensor, requested, obstacle)
    _last[operation] = choice
    return choice.backend


def implementation(operation: str, backend: str) -> Implementation:
    """``forward`` and ``backward`` of ``operation`` for ``blocked`` or ``triton``, imported on first use."""
    room = {"blocked": "blocked", "triton": "kernels"}[backend]
    return Implementation(importlib.import_module(f"smt_kernels.{operation}.{room}"))


class Implementation:
    """The functions of a module, as they are under autocast too."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return unaffected_by_autocast(getattr(self._module, name))


def unaffected_by_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose first argument is a tensor, computing in the dtypes of its arguments.

    An operation says itself what it accumulates in; autocast would lower the products that it is made of.
    """

    @functools.wraps(function)
    def run(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
        device = tensor.device.type
        if not torch.is_autocast_enabled(device):
            return function(tensor, *arguments, **settings)
        with torch.autocast(device, enabled=False):
            return function(tensor, *arguments, **settings)

    return run


def _decide(operation: str, tensor: Tensor, requested: str | None, obstacle: str | None) -> BackendChoice:
    wanted, source = (requested, "the backend argument") if requested is not None else (_override, "use_backend")
    obstacle = _triton_obstacle(operation, tensor) or obstacle
    if wanted is not None:
        _check_name(wanted)
        if wanted == "triton" and obstacle is not None:
            error = TypeError if operation in TRITON_LIMITS and tensor.dtype not in TRITON_DTYPES else ValueError
            raise error(f"backend 'triton' was asked for by {source}, but {obstacle}")
        return BackendChoice(operation, wanted, f"asked for by {source}")
    if tensor.device.type != "cuda":
        reason = f"the tensors are on {tensor.device.type}, and Triton kernels are for CUDA devices"
        return BackendChoice(operation, "blocked", reason)
    if obstacle is not None:
        return BackendChoice(operation, "blocked", obstacle)
    return BackendChoice(operation, "triton", "CUDA tensors that the kernel takes")


def _triton_obstacle(operation: str, tensor: Tensor) -> str | None:
    if operation not in TRITON_LIMITS:
        return f"{operation} has no Triton kernel yet"
    if tensor.dtype not in TRITON_DTYPES:
        return f"dtype {tensor.dtype} is not one that its kernel takes: {', '.join(map(str, TRITON_DTYPES))}"
    longest = TRITON_LIMITS[operation]
    if longest is not None and tensor.shape[-1] > longest:
        return f"its kernel takes a last dimension of at most {longest}, got {tensor.shape[-1]}"
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        where = f"the tensors are on {tensor.device.type}"
        return f"{where}; set TRITON_INTERPRET=1 before the first import of triton to run its interpreter"
    return None


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
