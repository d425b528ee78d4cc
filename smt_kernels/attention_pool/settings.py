"""Launch settings of attention pooling by a rule, in place of a table: chosen as ``smt_kernels.launch`` says, for W = 65."""

from __future__ import annotations

import torch

from smt_kernels import launch
from smt_kernels.launch import LaunchSettings, padded_size


def pool_settings(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> LaunchSettings:
    """Settings of ``kernel`` for entries of ``width`` in ``dtype`` on ``device``.

    An entry longer than the longest chunk is read by several programs, whole by each. The longest is 1,024 in half precision,
    512 where two sums have to be held or shared memory is small (CDNA), and 256 in fp32, whose products on ordinary units take
    more registers.
    """
    if dtype.itemsize == 4:
        longest = 256
    elif kernel == "query_backward_kernel" or launch.architecture_family(device) == "cdna":
        longest = 512
    else:
        longest = 1024
    chunk = min(padded_size(width), longest)
    return LaunchSettings(num_warps=4 if chunk <= 128 else 8, head_chunk=chunk)
