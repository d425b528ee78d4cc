"""Where groups and layers lie in the buffers of a pass, for the Triton backend.

Every view of a tensor takes the host as long as a small kernel takes a GPU. So views are formed of all layers at once: of the
whole pass once, of a group once for all its layers.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from smt_kernels.attention_pool import reference as pool
from smt_kernels.attention_pool.strips import Strips, strips_of
from smt_kernels.stride_memory.kept import Kept, chunks_of
from smt_kernels.stride_memory.reference import Group, MemoryWeights, Pass
from smt_kernels.stride_write import kept as write
from smt_kernels.stride_write.blocks import by_channel
from smt_kernels.stride_write.reference import Weights


class Place(NamedTuple):
    """One group."""

    group: Group
    writes: slice
    rows: slice  # of all K B
    chunks: slice  # of the scan

    def rows_of(self, buffer: Tensor) -> Tensor:
        """Its rows of a buffer (K, B, width), as a matrix."""
        return buffer[self.writes].flatten(0, 1)

    def rows_of_layers(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The same of a buffer (L, K, B, width), for each layer."""
        return buffer.flatten(1, 2)[:, self.rows].unbind(0)

    def writes_of_layers(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """Its part (k, B, width) of a buffer (L, K, B, width), for each layer."""
        return buffer[:, self.writes].unbind(0)


def places_of(groups: list[Group], batch: int) -> list[Place]:
    """Those of all groups of a pass."""
    places = []
    for group, chunks in zip(groups, chunks_of(groups), strict=True):
        start, stop = group.writes.start, group.writes.stop
        places.append(Place(group, slice(start, stop), slice(start * batch, stop * batch), chunks))
    return places


def packed(weights: MemoryWeights) -> MemoryWeights:
    """The weights as kernels take them: contiguous, but for a, of which the channels lie together, as they do of states."""
    contiguous = MemoryWeights(*(weight.contiguous() for weight in weights))
    return contiguous._replace(a=by_channel(weights.a))


class Layer(NamedTuple):
    """What a pass takes and keeps of one layer."""

    norm: Tensor  # (d,)
    in_proj: Tensor  # (2 E, d)
    in_proj_t: Tensor  # (d, 2 E)
    out_proj: Tensor  # (d, E)
    out_proj_t: Tensor  # (E, d)
    inputs: Tensor  # (K, B, E), of the convolution
    conv_state: Tensor  # (B, E, C - 1)
    u: Tensor  # (K, B, E)
    write: Weights


def layers_of(run: Pass, kept: Kept) -> list[Layer]:
    """All of them."""
    weights, inner = run.weights, run.weights.a.shape[1]
    matrices = weights.in_proj, weights.in_proj.mT, weights.out_proj, weights.out_proj.mT
    stacked = weights.norm, *matrices, kept.xz[..., :inner], run.inputs.conv_state, kept.u
    return [Layer(*of_layer) for of_layer in zip(*(part.unbind(0) for part in stacked), weights.writes(), strict=True)]


def written_of_layers(place: Place, kept: Kept) -> list[write.Kept]:
    """What ``stride_write`` keeps of a group in each layer."""
    parts = (place.writes_of_layers(buffer) for buffer in (kept.u, kept.dt_product, kept.projected))
    return [write.Kept(*of_layer) for of_layer in zip(*parts, kept.starts[:, place.chunks].unbind(0), strict=True)]


def pooled_by(place: Place, run: Pass, kept: Kept, dropout: Tensor | None) -> tuple[pool.Inputs, Strips]:
    """What the windows of a group are pooled from, read in place; dropout is (K, B, W)."""
    group = place.group
    slots = None if run.slots is None else kept.slots[group.slots].transpose(0, 1)
    of_group = None if dropout is None else place.rows_of(dropout)
    inputs = pool.Inputs(run.tokens[:, group.tokens], slots, run.weights.w_q, run.weights.w_k, None, of_group)
    return inputs, strips_of(inputs, run.window, group.timeline)
