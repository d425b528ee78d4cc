"""Where a group of writes lies in the buffers of a pass, for the Triton backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from smt_kernels.attention_pool import reference as pool
from smt_kernels.attention_pool.strips import Strips, strips_of
from smt_kernels.stride_memory.kept import Kept, chunks_of
from smt_kernels.stride_memory.reference import Group, MemoryWeights
from smt_kernels.stride_write import kept as write
from smt_kernels.window import WindowSpec


class Place(NamedTuple):
    """One group."""

    group: Group
    writes: slice
    rows: slice  # of all K B
    chunks: slice  # of the scan

    def rows_of(self, buffer: Tensor) -> Tensor:
        """Its rows of a buffer (K, B, width), as a matrix."""
        return buffer[self.writes].flatten(0, 1)

    def written(self, kept: Kept, layer: int) -> write.Kept:
        """What ``stride_write`` keeps of it in one layer."""
        u, dt_product, projected = (buffer[layer, self.writes] for buffer in (kept.u, kept.dt_product, kept.projected))
        return write.Kept(u, dt_product, projected, kept.starts[layer, self.chunks])


def places_of(groups: list[Group], batch: int) -> list[Place]:
    """Those of all groups of a pass."""
    places = []
    for group, chunks in zip(groups, chunks_of(groups), strict=True):
        start, stop = group.writes.start, group.writes.stop
        places.append(Place(group, slice(start, stop), slice(start * batch, stop * batch), chunks))
    return places


def pooled_by(
    place: Place, tokens: Tensor, kept: Kept, weights: MemoryWeights, dropout: Tensor | None, window: WindowSpec
) -> tuple[pool.Inputs, Strips]:
    """What the windows of a group are pooled from, read in place; dropout is (K, B, W)."""
    group = place.group
    slots = kept.slots[group.slots].transpose(0, 1) if kept.slots.numel() else None
    of_group = None if dropout is None else place.rows_of(dropout)
    inputs = pool.Inputs(tokens[:, group.tokens], slots, weights.w_q, weights.w_k, None, of_group)
    return inputs, strips_of(inputs, window, group.timeline)
