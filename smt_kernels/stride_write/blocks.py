"""What the kernels of the SSM write share: the parts of its formula, how a program finds its channels, and launch settings.

Names: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block of values, with its shape behind it; E, N, R are block sizes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from smt_kernels import launch as launching
from smt_kernels.launch import compiler_options


@triton.jit
def softplus(b_x):
    """max(x, 0) + log1p(t) with t = exp(-|x|), and log1p(t) = 2 artanh(s) with s = t / (2 + t) <= 1 / 3.

    The polynomial is 2 artanh(s) / s in s^2, interpolated at Chebyshev's points of [0, 1 / 9]: off by 4e-9 at most, and without
    the rounding of 1 + t.
    """
    b_t = tl.exp(-tl.abs(b_x))
    b_s = b_t / (2.0 + b_t)
    b_square = b_s * b_s
    b_sum = b_square * 0.28157779574394226 + 0.27965158224105835
    b_sum = b_square * b_sum + 0.4002459645271301
    b_sum = b_square * b_sum + 0.6666632294654846
    return tl.maximum(b_x, 0.0) + b_s * (b_square * b_sum + 2.0)


@triton.jit
def silu(b_x):
    return b_x * tl.sigmoid(b_x)


@triton.jit
def silu_gradient(b_x):
    b_sigmoid = tl.sigmoid(b_x)
    return b_sigmoid * (1.0 + b_x * (1.0 - b_sigmoid))


@triton.jit
def channels(i_block, width, E: tl.constexpr):
    """Offsets of one block of E, in 64 bits, and which of them exist."""
    o_e = (i_block * E + tl.arange(0, E)).to(tl.int64)
    return o_e, o_e < width


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointers, b_value, mask):
    tl.store(pointers, b_value.to(pointers.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class BlockSettings:
    """How one kernel is launched, how many values the largest block of one of its programs holds, and, where it walks over
    writes, of how many of them it loads all at once. Blocks of a scan are halved while there are fewer than ``programs``.
    """

    num_warps: int
    elements: int
    steps: int = 1
    programs: int = 0

    def width(self, rows: int) -> int:
        """How many of the E channels a program works on at a time, when it holds ``rows`` values for each."""
        return 1 << max(self.elements // rows, 1).bit_length() - 1

    @functools.cached_property
    def options(self) -> dict[str, int | bool]:
        return compiler_options(self.num_warps, num_stages=1)


# Chosen by the rules of ``smt_kernels.launch``: no spills for N = 16 states of bf16 or fp32. Every kernel works on blocks of E,
# whose size follows from what else a block holds: the scans (N, E) states, the convolutions (rows, E) inputs, a single write
# (R + 2 N, E) products. The scans have one warp, whose threads hold all states of a channel each: sums over states then take
# no other thread, and nothing that a channel has one of is computed twice. Where that makes fewer warps than an H100 has
# schedulers (528), so that some have nothing to do and none anything else to do, two threads share a channel: docs/log.md, 27
# November, says what that gains. Between 384 warps and 1,536 nothing was measured.
_GPU = {
    "single_write": BlockSettings(num_warps=8, elements=12288),
    "convolution": BlockSettings(num_warps=4, elements=1024),
    "convolution_backward": BlockSettings(num_warps=4, elements=512),
    # Products in fp32 take more registers.
    "convolution_fp32": BlockSettings(num_warps=4, elements=512),
    "convolution_backward_fp32": BlockSettings(num_warps=4, elements=512),
    "fold": BlockSettings(num_warps=4, elements=4096),
    "conv_state": BlockSettings(num_warps=4, elements=256),
    "scan": BlockSettings(num_warps=1, elements=512, steps=4, programs=512),
    "carry": BlockSettings(num_warps=8, elements=512, steps=8),
    "local_backward": BlockSettings(num_warps=1, elements=512, steps=8),
    "scan_backward": BlockSettings(num_warps=1, elements=512, steps=2, programs=512),
}

# The interpreter takes as long for a large block as for a small one.
_INTERPRETER = BlockSettings(num_warps=1, elements=8192, steps=4)


def settings(kernel: str, device: torch.device) -> BlockSettings:
    """Settings of ``kernel`` on ``device``; the same on every GPU, where none of these kernels uses matrix units."""
    return _INTERPRETER if launching.architecture_family(device) == "interpreter" else _GPU[kernel]


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """The strides that a kernel gets of ``tensor``, None included."""
    return (0, 0, 0) if tensor is None else tensor.stride()


def by_channel(states: Tensor) -> Tensor:
    """(..., E, N), in memory (..., N, E): each thread of a scan takes a channel, and all read what lies together."""
    return states.mT.contiguous().mT


def partial_sums(model: Tensor, *shape: int) -> Tensor:
    """Memory for sums in fp32 on the device of ``model``."""
    return model.new_empty(shape, dtype=torch.float32)
