"""Launch settings of stream attention, chosen for a window of 15 + 50 by the rules of ``smt_kernels.launch``."""

from __future__ import annotations

from dataclasses import replace

from smt_kernels.launch import FAMILIES, LaunchSettings, Table

_FORWARD, _GROUPED = "stream_attention_forward", "stream_attention_forward_grouped"
_STEPS, _SLOTS = "stream_attention_steps", "stream_attention_slots"

# Slots multiplied at a time. 64 queries see 19 of the default window's: a block of 64 would waste most of its products.
SLOT_BLOCK = 32

# Where the registers do not hold the gradients of queries and tokens together, one launch computes each, and reads more.
SEPARATE_FAMILIES = ("ampere",)

_SMALL = tuple(LaunchSettings(num_warps=4, head_chunk=chunk, key_block=32) for chunk in (16, 32, 64))
_LARGE = (LaunchSettings(num_warps=8, head_chunk=128, key_block=32),) * 2
_FORWARD_HALF = (*_SMALL, LaunchSettings(num_warps=4, head_chunk=128, key_block=32), _LARGE[1])
# Heads that share keys share the rows of a program: more rows for them, so that its queries are as many.
_GROUPED_HALF = (*(replace(settings, num_warps=8, query_block=128) for settings in _FORWARD_HALF[:4]), _LARGE[1])
_SLOTS_HALF = (
    *(LaunchSettings(num_warps=8, head_chunk=chunk) for chunk in (16, 32, 64)),
    *(LaunchSettings(num_warps=8, head_chunk=128, query_block=32),) * 2,
)
# Products of fp32 run on the ordinary units of NVIDIA chips, which unroll them whole: hence their small chunks.
_SINGLE = (LaunchSettings(num_warps=8, head_chunk=16, query_block=32, key_block=32),) * 5
_INTERPRETER = tuple(LaunchSettings(num_warps=4, head_chunk=chunk) for chunk in (16, 32, 64, 128, 128))

TABLE: Table = {
    **{(kernel, family, 4): _SINGLE for kernel in (_FORWARD, _GROUPED, _STEPS, _SLOTS) for family in FAMILIES},
    **{(_FORWARD, family, 2): _FORWARD_HALF for family in FAMILIES},
    **{(_GROUPED, family, 2): _GROUPED_HALF for family in FAMILIES},
    **{(_SLOTS, family, 2): _SLOTS_HALF for family in FAMILIES},
    # 64 rows spill in triton 3.6.
    (_SLOTS, "cdna", 2): (*_SLOTS_HALF[:2], replace(_SLOTS_HALF[2], query_block=32), *_SLOTS_HALF[3:]),
    (_STEPS, "ampere", 2): (
        *_SMALL[:2],
        LaunchSettings(num_warps=4, head_chunk=64, key_block=16),
        _LARGE[0],
        LaunchSettings(num_warps=4, head_chunk=64, query_block=32, key_block=32),
    ),
    # Measured on an H200 with triton 3.6 and heads of 64, both backward launches: key blocks of 64 take 356 us, of 32 373, of
    # 16 398; 8 warps 458 and more. Nothing else was measured: 16 for heads of 128 is chosen by rule, since 32 spill in triton
    # 3.6 and 3.8. So are Blackwell's 16 for heads of 64 and 4 warps for heads of 128: 32, and 8 warps, spill in 3.8.
    (_STEPS, "hopper", 2): (*_SMALL, replace(_LARGE[0], key_block=16), _LARGE[1]),
    (_STEPS, "blackwell", 2): (*_SMALL[:2], replace(_SMALL[2], key_block=16), replace(_LARGE[0], num_warps=4), _LARGE[1]),
    (_STEPS, "cdna", 2): (*_SMALL, *(LaunchSettings(num_warps=4, head_chunk=64, key_block=32),) * 2),
    **{(kernel, "interpreter", size): _INTERPRETER for kernel in (_FORWARD, _STEPS, _SLOTS) for size in (2, 4)},
    **{(_GROUPED, "interpreter", size): tuple(replace(x, query_block=128) for x in _INTERPRETER) for size in (2, 4)},
}
