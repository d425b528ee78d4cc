"""The memory's writes in Triton, forward: the launches of a pass, and the library's products between them.

    group     mean (launch);   query, u (products);   weights and pooled (launch)
    layer     x, RMSNorm (launch);   W_in (product);   convolution, its share of W_x (launch);   W_dt, scan, gate (launch);
              W_out (product)
    group     x, final RMSNorm (launch)

Rows are counted with time first, k B + b, so that those of a group are one matrix. x stays in fp32, and so does the SSM state;
matrices are multiplied in the dtype of tokens. Nothing is copied from the host or read back, and no shape depends on data, so
that a CUDA graph can hold a pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels.attention_pool import kernels as pooling
from smt_kernels.attention_pool import reference as pool
from smt_kernels.attention_pool.reference import Timeline
from smt_kernels.stride_memory.gradients import backward
from smt_kernels.stride_memory.kept import new_kept
from smt_kernels.stride_memory.norm import add_and_norm
from smt_kernels.stride_memory.places import places_of, pooled_by
from smt_kernels.stride_memory.reference import Inputs, MemoryWeights, groups_of
from smt_kernels.stride_write.conv_states import conv_states
from smt_kernels.stride_write.kernels import write_rows
from smt_kernels.stride_write.order import order_of
from smt_kernels.stride_write.scan import scan
from smt_kernels.window import WindowSpec

__all__ = ["backward", "forward"]


def forward(
    tokens: Tensor,
    slots: Tensor | None,
    weights: MemoryWeights,
    inputs: Inputs,
    window: WindowSpec,
    timeline: Timeline,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slots (B, K, d), both states after K writes, pooling weights (K, B, W) in fp32, and what ``backward`` needs."""
    # Plain tuples where compiled ahead of time.
    weights, inputs, timeline = MemoryWeights(*weights), Inputs(*inputs), Timeline(*timeline)
    buffer, kept = new_kept("triton", tokens, slots, weights, inputs, window, timeline)
    weights = MemoryWeights(*(weight.contiguous() for weight in weights))
    (layers, inner, _), (batch, _, width) = weights.a.shape, tokens.shape
    new_slots = weights.norm_f.new_empty(batch, timeline.n_writes, width)
    new_conv, new_ssm = (state.new_empty(state.shape) for state in (inputs.conv_state, inputs.ssm_state))
    size = window.n_tokens if slots is None else window.size
    pool_weights = tokens.new_empty((timeline.n_writes, batch, size), dtype=torch.float32)
    dropout = None if inputs.dropout is None else inputs.dropout.transpose(0, 1).contiguous()
    order, strides_place = order_of(inputs.gate), (1, batch)
    if slots is not None:
        kept.slots[: slots.shape[1]] = slots.transpose(0, 1)
    kept.starts[:, 0] = inputs.ssm_state
    n_chunks = kept.starts.shape[1]
    for place in places_of(groups_of(window, timeline, None if slots is None else slots.shape[1]), batch):
        pooled_from, strips = pooled_by(place, tokens, kept, weights, dropout, window)
        kept_of_pool = pool.Kept(*map(place.rows_of, (pool_weights, kept.mean, kept.query, kept.u_pool)))
        x, update = (tokens.new_empty(len(kept_of_pool.mean), width) for _ in range(2))
        pooling.pool(pooled_from, strips, strides_place, normalise, kept_of_pool, x)
        gate = None if inputs.gate is None else inputs.gate[:, place.writes]
        for layer in range(layers):
            total, normed, xz, y = (place.rows_of(of[layer]) for of in (kept.x, kept.normed, kept.xz, kept.y))
            add_and_norm(x, update if layer else None, weights.norm[layer], total, normed)
            torch.mm(normed, weights.in_proj[layer].T, out=xz)
            of_write, halves = weights.write(layer), kept.xz[layer]
            partials = write_rows(
                halves[..., :inner], inputs.conv_state[layer], order, of_write, kept.u[layer], place.group.writes
            )
            stop = place.chunks.stop
            scan(
                halves[place.writes, :, inner:],
                gate,
                place.written(kept, layer),
                partials,
                of_write,
                kept.starts[layer, place.chunks.start],
                kept.y[layer, place.writes],
                kept.starts[layer, stop] if stop < n_chunks else new_ssm[layer],
            )
            torch.mm(y, weights.out_proj[layer].T, out=update)
            x = total
        new = None if slots is None else kept.slots[slots.shape[1] :][place.writes].flatten(0, 1)
        last = place.rows_of(kept.x[layers])
        add_and_norm(x, update, weights.norm_f, last, new, new_slots.transpose(0, 1)[place.writes])
    conv_states(kept.xz[..., :inner], inputs.conv_state, order, new_conv)
    return new_slots, new_conv, new_ssm, pool_weights, buffer
