"""Launch settings of the SSM write, by the rules of ``smt_kernels.launch``: no spills for N = 16 states of bf16 or fp32,
save for a register of the backward scan in triton 3.6 on sm_90.

Every kernel works on blocks of E, whose size follows from what else a block holds: ``elements`` is the number of values, per
program, of the largest of them. The scans hold (E, N) states, a single write the (R + 2 N, E) products of its projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smt_kernels import launch


@dataclass(frozen=True)
class BlockSettings:
    """How one kernel is launched, and how many values the largest block of one of its programs holds."""

    num_warps: int
    elements: int

    def width(self, rows: int) -> int:
        """How many of the E channels a program works on at a time, when it holds ``rows`` values for each."""
        return 1 << max(self.elements // rows, 1).bit_length() - 1

    @property
    def options(self) -> dict[str, int | bool]:
        """The compiler options, as keyword arguments of a launch."""
        # Fused multiply-adds are asked for because the default is about to differ between versions of Triton.
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


# Small blocks: a row of E = 1536 makes 48 programs of a scan, so that a few rows fill a GPU.
_GPU = {
    "single_write": BlockSettings(num_warps=8, elements=12288),
    "convolution": BlockSettings(num_warps=2, elements=128),
    "convolution_backward": BlockSettings(num_warps=4, elements=128),
    "scan": BlockSettings(num_warps=2, elements=512),
    "scan_backward": BlockSettings(num_warps=4, elements=256),
}

# The interpreter takes as long for a large block as for a small one.
_INTERPRETER = BlockSettings(num_warps=1, elements=8192)


def settings(kernel: str, device: torch.device) -> BlockSettings:
    """Settings of ``kernel`` on ``device``; the same on every GPU, where none of these kernels uses matrix units."""
    return _INTERPRETER if launch.architecture_family(device) == "interpreter" else _GPU[kernel]
