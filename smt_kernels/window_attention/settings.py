"""Launch settings of window attention, chosen for W = 65 by the rules of ``smt_kernels.launch``.

fp32 heads of 256 spill up to 66 registers on NVIDIA chips, and in the backward pass those of 128 up to six. Those of 64 spill
twelve on sm_80 in the forward pass with triton 3.6, eight with 3.9, and none with 3.7 and 3.8.
"""

from __future__ import annotations

from smt_kernels.launch import LaunchSettings, Table

# Ordinary units, where most products of fp32 run here, unroll them whole: hence their small chunks.
_FORWARD, _BACKWARD = "window_attention_forward", "window_attention_backward"
_FORWARD_HALF = tuple(LaunchSettings(num_warps=4, head_chunk=chunk) for chunk in (16, 32, 64, 128, 64))
_FORWARD_SINGLE = (LaunchSettings(num_warps=8, head_chunk=16),) * 5
_BACKWARD_SINGLE = (LaunchSettings(num_warps=8, head_chunk=16, query_block=16),) * 5
_BACKWARD_32_QUERIES = tuple(LaunchSettings(num_warps=4, head_chunk=chunk, query_block=32) for chunk in (16, 32, 64, 64, 64))

_INTERPRETER = tuple(LaunchSettings(num_warps=4, head_chunk=chunk) for chunk in (16, 32, 64, 128, 128))

TABLE: Table = {
    (_FORWARD, "ampere", 2): (*_FORWARD_HALF[:4], LaunchSettings(num_warps=4, head_chunk=64, query_block=32)),
    (_FORWARD, "hopper", 2): _FORWARD_HALF,
    (_FORWARD, "blackwell", 2): _FORWARD_HALF,
    (_FORWARD, "cdna", 2): _FORWARD_HALF,
    (_FORWARD, "ampere", 4): _FORWARD_SINGLE,
    (_FORWARD, "hopper", 4): _FORWARD_SINGLE,
    (_FORWARD, "blackwell", 4): _FORWARD_SINGLE,
    (_FORWARD, "cdna", 4): (
        *(LaunchSettings(num_warps=4, head_chunk=chunk) for chunk in (16, 32, 64, 64)),
        LaunchSettings(num_warps=4, head_chunk=16, query_block=16),
    ),
    (_BACKWARD, "ampere", 2): (
        LaunchSettings(num_warps=4, head_chunk=16),
        LaunchSettings(num_warps=4, head_chunk=32),
        LaunchSettings(num_warps=4, head_chunk=64, query_block=32),
        LaunchSettings(num_warps=8, head_chunk=64),
        LaunchSettings(num_warps=8, head_chunk=64),
    ),
    (_BACKWARD, "hopper", 2): (
        *(LaunchSettings(num_warps=4, head_chunk=chunk) for chunk in (16, 32, 64, 64)),
        LaunchSettings(num_warps=8, head_chunk=64),
    ),
    (_BACKWARD, "blackwell", 2): (*_BACKWARD_32_QUERIES[:3], *(LaunchSettings(num_warps=8, head_chunk=64),) * 2),
    (_BACKWARD, "cdna", 2): _BACKWARD_32_QUERIES,
    (_BACKWARD, "ampere", 4): _BACKWARD_SINGLE,
    (_BACKWARD, "hopper", 4): _BACKWARD_SINGLE,
    (_BACKWARD, "blackwell", 4): _BACKWARD_SINGLE,
    (_BACKWARD, "cdna", 4): tuple(
        LaunchSettings(num_warps=4, head_chunk=chunk, query_block=16) for chunk in (16, 32, 32, 32, 32)
    ),
    (_FORWARD, "interpreter", 2): _INTERPRETER,
    (_FORWARD, "interpreter", 4): _INTERPRETER,
    (_BACKWARD, "interpreter", 2): _INTERPRETER,
    (_BACKWARD, "interpreter", 4): _INTERPRETER,
}
