"""Launch settings of the decoding step of stream attention, chosen for rings of 15 + 50; see ``smt_kernels.launch``."""

from __future__ import annotations

from smt_kernels.launch import FAMILIES, LaunchSettings, Table

_HALF = tuple(LaunchSettings(num_warps=4, head_chunk=chunk, key_block=32) for chunk in (16, 32, 64, 128, 256))
_SINGLE = tuple(LaunchSettings(num_warps=4, head_chunk=chunk) for chunk in (16, 32, 64, 64, 64))

TABLE: Table = {
    ("stream_attention_decode", family, size): settings for family in FAMILIES for size, settings in ((2, _HALF), (4, _SINGLE))
}
