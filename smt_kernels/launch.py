"""Launch settings of the Triton kernels, as data: warps, stages and head chunks per kernel, architecture and head size.

The shapes of this package are fixed by the window, so a committed table replaces autotuning: the first call is as fast as
the second, and two machines of one architecture compute the same bits. The figures are chosen from ahead-of-time
compilation (``smt_kernels.testing.aot``), by these rules in this order: no register spills, shared memory within what
the smallest chip of the family has, then the most resident warps per multiprocessor, then fewer warps.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

FAMILIES = ("ampere", "hopper", "blackwell", "cdna")


@dataclass(frozen=True)
class LaunchSettings:
    """How one kernel is launched.

    ``head_chunk`` is how many of the head dimensions one program writes. ``max_registers`` per thread make room for a second
    program on a multiprocessor where the compiler, left alone, takes more than it needs; None leaves it alone.
    """

    num_warps: int
    num_stages: int
    head_chunk: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | bool]:
        """The compiler options, as keyword arguments of a launch."""
        # Fused multiply-adds are asked for because the default is about to differ between versions of Triton.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


# (kernel, family) -> {bytes of a padded head row: (warps, stages, bytes of a head chunk, max_registers)}. A row longer than its
# chunk is spread over programs, each of which recomputes the scores: shared memory then does not grow with the head.
_HEAD_ROWS = (32, 64, 128, 256, 512, 1024)
_TABLE: dict[tuple[str, str], dict[int, tuple[int, int, int, int | None]]] = {
    ("window_attention_forward", family): {row: (4, 1, min(row, 256), None) for row in _HEAD_ROWS} for family in FAMILIES
} | {("window_attention_backward", family): {row: (8, 1, min(row, 256), None) for row in _HEAD_ROWS} for family in FAMILIES}


def padded_size(size: int) -> int:
    """The block that holds ``size`` entries: the next power of two, and at least 16, the least that a dot takes."""
    return max(16, 1 << (size - 1).bit_length())


def architecture_family(device: torch.device) -> str:
    """The family of ``device``, one of ``FAMILIES``; a CPU, where kernels are interpreted, counts as the first."""
    if device.type != "cuda":
        return "ampere"
    if torch.version.hip is not None:
        return "cdna"
    # Compute capability 12 (consumer Blackwell) has the matrix instructions and the shared memory of capability 8.
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(torch.cuda.get_device_capability(device)[0], "ampere")


def head_settings(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> LaunchSettings:
    """Settings of ``kernel`` for heads of ``head_dim`` in ``dtype`` on ``device``.

    Raises:
        ValueError: the head is longer than any in the table.
    """
    rows = _TABLE[kernel, architecture_family(device)]
    row = padded_size(head_dim) * dtype.itemsize
    if row not in rows:
        longest = max(rows) // dtype.itemsize
        raise ValueError(f"head size must be at most {longest} for {kernel} in {dtype}, got {head_dim}")
    num_warps, num_stages, chunk, max_registers = rows[row]
    return LaunchSettings(num_warps, num_stages, chunk // dtype.itemsize, max_registers)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **named: Any) -> None:
    """Launch a Triton ``kernel`` on ``device``, whichever device is current; on a CPU, in the mended interpreter."""
    if device.type == "cpu":
        importlib.import_module("smt_kernels.testing.interpreter")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **named)
