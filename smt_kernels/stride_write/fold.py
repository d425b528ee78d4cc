"""The sum of partial sums: what every block of E adds to a product over all of E, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smt_kernels.launch import ceil_div, launch, power_of_two
from smt_kernels.stride_write.blocks import load, settings, store

# Most partial sums that a program has on the way at a time.
AT_ONCE = 64


@triton.jit(do_not_specialize=["size"])
def fold_kernel(partials, total, size, PARTIALS: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr):
    """The sum of ``PARTIALS`` partial sums, P of them on the way at a time."""
    o_entry = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    o_p = tl.arange(0, P)
    b_sum = tl.zeros([SIZE], dtype=tl.float32)
    for i in range(0, PARTIALS, P):
        mask = (i + o_p < PARTIALS)[:, None] & (o_entry < size)[None, :]
        b_sum += tl.sum(load(partials + (i + o_p).to(tl.int64)[:, None] * size + o_entry[None, :], mask), axis=0)
    store(total + o_entry, b_sum, o_entry < size)


def fold(partials: Tensor, total: Tensor) -> None:
    """Fill ``total`` with the sum of contiguous ``partials`` (any number, entries as total has), in its dtype."""
    chosen, count, size = settings("fold", total.device), len(partials), total.numel()
    at_once = min(power_of_two(count), AT_ONCE)
    block = chosen.width(at_once)
    sizes = {"size": size, "PARTIALS": count, "P": at_once, "SIZE": block, **chosen.options}
    launch(fold_kernel, (ceil_div(size, block),), total.device, partials=partials, total=total, **sizes)
