"""Launch settings of stream attention, chosen for a window of 15 + 50 by the rules of ``smt_kernels.launch``.

64 queries see 19 slots of that window: a block of 64 slots would waste most of its products.
"""

from __future__ import annotations

from dataclasses import replace

from smt_kernels.launch import FAMILIES, LaunchSettings, Table

_FORWARD, _GROUPED = "stream_attention_forward", "stream_attention_forward_grouped"
_STEPS, _SLOTS = "stream_attention_steps", "stream_attention_slots"

# Where the registers do not hold the gradients of queries and tokens together, one launch computes each, and reads more: by
# family and bytes of an element.
SEPARATE = {("ampere", 2), ("ampere", 4), ("hopper", 4), ("blackwell", 4)}

_SMALL = tuple(LaunchSettings(num_warps=4, head_chunk=chunk, key_block=32) for chunk in (16, 32, 64))
_LARGE = (LaunchSettings(num_warps=8, head_chunk=128, key_block=32),) * 2
_FORWARD_HALF = (*_SMALL, LaunchSettings(num_warps=4, head_chunk=128, key_block=32), _LARGE[1])
# Heads that share keys share the rows of a program: more rows for them, so that its queries are as many.
_GROUPED_HALF = (*(replace(settings, num_warps=8, query_block=128) for settings in _FORWARD_HALF[:4]), _LARGE[1])
_SLOTS_HALF = (
    *(LaunchSettings(num_warps=8, head_chunk=chunk) for chunk in (16, 32, 64)),
    *(LaunchSettings(num_warps=8, head_chunk=128, query_block=32),) * 2,
)
# Products of fp32 are three of tf32 on NVIDIA's matrix units, and none of CDNA's, where the ordinary units unroll them whole.
_SINGLE_CDNA = (LaunchSettings(num_warps=8, head_chunk=16, query_block=32, key_block=32),) * 5
_CHUNKS_SINGLE = (16, 32, 64, 64, 64)
_SINGLE = {
    _FORWARD: tuple(LaunchSettings(num_warps=4, head_chunk=chunk, key_block=32) for chunk in _CHUNKS_SINGLE),
    _GROUPED: tuple(LaunchSettings(num_warps=4, head_chunk=chunk, key_block=32) for chunk in _CHUNKS_SINGLE),
    _STEPS: tuple(LaunchSettings(num_warps=8, head_chunk=chunk, key_block=32) for chunk in _CHUNKS_SINGLE),
    _SLOTS: tuple(LaunchSettings(num_warps=8, head_chunk=chunk, query_block=32) for chunk in _CHUNKS_SINGLE),
}
_INTERPRETER = tuple(LaunchSettings(num_warps=4, head_chunk=chunk) for chunk in (16, 32, 64, 128, 128))

TABLE: Table = {
    # fp32, heads of 64, 4 x 4,096 x 12, forward, on an H200 with triton 3.6: 215 us; in products of ordinary units 803 at best.
    **{(kernel, family, 4): _SINGLE[kernel] for kernel in _SINGLE for family in FAMILIES},
    **{
        (kernel, "ampere", 4): (*_SINGLE[kernel][:2], *(replace(_SINGLE[kernel][1], query_block=32),) * 3) for kernel in _SINGLE
    },
    # All chunks of a head lie in shared memory at once, of which consumer chips have 99 KiB: heads of 256 would take 132.
    **{
        (kernel, "ampere", 4): (
            *_SINGLE[kernel][:2],
            *(replace(_SINGLE[kernel][1], query_block=32),) * 2,
            replace(_SINGLE[kernel][1], query_block=16, slot_block=16),
        )
        for kernel in (_STEPS, _SLOTS)
    },
    # 64 rows would take 272 KiB of Hopper's 227, and spill twice as much on Blackwell.
    **{
        (_STEPS, family, 4): (*_SINGLE[_STEPS][:4], replace(_SINGLE[_STEPS][4], query_block=32))
        for family in ("hopper", "blackwell")
    },
    **{(kernel, "cdna", 4): _SINGLE_CDNA for kernel in _SINGLE},
    **{(_FORWARD, family, 2): _FORWARD_HALF for family in FAMILIES},
    **{(_GROUPED, family, 2): _GROUPED_HALF for family in FAMILIES},
    **{(_SLOTS, family, 2): _SLOTS_HALF for family in FAMILIES},
    # Measured on an H200 with triton 3.6, 8 x 4,096 x 12 heads. Heads of 64: 97 us with three stages, 102 with one; 8 warps for
    # 128 rows 129. Heads of 128: 149 us with two stages, 161 with three, 177 with one; 8 warps 258 and more.
    (_FORWARD, "hopper", 2): (
        *_SMALL[:2],
        replace(_SMALL[2], num_stages=3),
        replace(_FORWARD_HALF[3], num_stages=2),
        _LARGE[1],
    ),
    # 12 heads of 64 on 4: 86 us in 64 rows, though more is read, 105 in 128 rows with 8 warps and 112 with 4.
    (_GROUPED, "hopper", 2): (*_GROUPED_HALF[:2], replace(_SMALL[2], num_stages=2), *_GROUPED_HALF[3:]),
    # Heads of 64, both backward launches: 322 to 323 us with 4 warps and three stages in 64 or 128 rows, 329 with two, 368 with
    # 8 warps and one.
    (_SLOTS, "hopper", 2): (
        *_SLOTS_HALF[:2],
        LaunchSettings(num_warps=4, head_chunk=64, num_stages=3),
        *_SLOTS_HALF[3:],
    ),
    # 64 rows spill in triton 3.6.
    (_SLOTS, "cdna", 2): (*_SLOTS_HALF[:2], replace(_SLOTS_HALF[2], query_block=32), *_SLOTS_HALF[3:]),
    (_STEPS, "ampere", 2): (
        *_SMALL[:2],
        LaunchSettings(num_warps=4, head_chunk=64, key_block=16),
        _LARGE[0],
        LaunchSettings(num_warps=4, head_chunk=64, query_block=32, key_block=32),
    ),
    # Both backward launches on an H200 with triton 3.6, heads of 64: 304 us in key blocks of 64, 322 of 32; 8 warps 458 and
    # more. With 12 query heads on 4: 328 and 310. Heads of 128: 736 us as here, with 108 spills; 1,039 with 8 warps and
    # 8 spills; key blocks of 16 with 8 warps spill nothing and fault: an illegal address. Blackwell's are chosen by rule: 16
    # for heads of 64 and 4 warps for heads of 128, since 32, and 8 warps, spill in triton 3.8.
    (_STEPS, "hopper", 2): (
        *_SMALL[:2],
        replace(_SMALL[2], key_block=64),
        LaunchSettings(num_warps=4, head_chunk=128, key_block=32),
        _LARGE[1],
    ),
    (_STEPS, "blackwell", 2): (*_SMALL[:2], replace(_SMALL[2], key_block=16), replace(_LARGE[0], num_warps=4), _LARGE[1]),
    (_STEPS, "cdna", 2): (*_SMALL, *(LaunchSettings(num_warps=4, head_chunk=64, key_block=32),) * 2),
    **{(kernel, "interpreter", size): _INTERPRETER for kernel in (_FORWARD, _STEPS, _SLOTS) for size in (2, 4)},
    **{(_GROUPED, "interpreter", size): tuple(replace(x, query_block=128) for x in _INTERPRETER) for size in (2, 4)},
}
