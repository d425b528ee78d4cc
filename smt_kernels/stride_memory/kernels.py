"""The memory's writes in Triton, forward: the launches of a pass, and the library's products between them.

    group     mean (launch);   query, u (products);   weights and pooled (launch)
    layer     x, RMSNorm (launch);   W_in (product);   convolution, its share of W_x (launch);   sums of the shares (launch);
              W_dt, scan, gate (launch);   W_out (product)
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
from smt_kernels.stride_memory.gradients import backward
from smt_kernels.stride_memory.kept import layout
from smt_kernels.stride_memory.norm import add_and_norm
from smt_kernels.stride_memory.places import layers_of, packed, places_of, pooled_by, written_of_layers
from smt_kernels.stride_memory.reference import Pass
from smt_kernels.stride_write.conv_states import conv_states
from smt_kernels.stride_write.kernels import write_rows
from smt_kernels.stride_write.order import order_of
from smt_kernels.stride_write.scan import scan

__all__ = ["backward", "forward"]


def forward(run: Pass) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slots (B, K, d), both states after K writes, pooling weights (K, B, W) in fp32, and what ``backward`` needs."""
    run = Pass.of(run)
    buffer, kept = layout("triton", run).new(run.tokens)
    run = run._replace(weights=packed(run.weights))
    tokens, slots, weights, inputs, *_ = run
    (n_layers, inner, _), (batch, _, width), n_writes = weights.a.shape, tokens.shape, run.timeline.n_writes
    new_slots = weights.norm_f.new_empty(batch, n_writes, width)
    new_conv, new_ssm = (state.new_empty(state.shape) for state in (inputs.conv_state, inputs.ssm_state))
    pool_weights = tokens.new_empty((n_writes, batch, run.pooled_size), dtype=torch.float32)
    dropout = None if inputs.dropout is None else inputs.dropout.transpose(0, 1).contiguous()
    order, strides_place = order_of(inputs.gate), (1, batch)
    if slots is not None:
        kept.slots[: run.n_slots] = slots.transpose(0, 1)
    states = kept.starts.mT
    states[:, 0] = inputs.ssm_state
    n_chunks, layers, slots_by_time = states.shape[1], layers_of(run, kept), new_slots.transpose(0, 1)
    for place in places_of(run.groups(), batch):
        pooled_from, strips = pooled_by(place, run, kept, dropout)
        kept_of_pool = pool.Kept(*map(place.rows_of, (pool_weights, kept.mean, kept.query, kept.u_pool)))
        x, update = (tokens.new_empty(len(kept_of_pool.mean), width) for _ in range(2))
        pooling.pool(pooled_from, strips, strides_place, run.normalise, kept_of_pool, x)
        gate = None if inputs.gate is None else inputs.gate[:, place.writes]
        totals, normed, xz, y = (place.rows_of_layers(of) for of in (kept.x, kept.normed, kept.xz, kept.y))
        z, gated = (place.writes_of_layers(of) for of in (kept.xz[..., inner:], kept.y))
        written, start, stop = written_of_layers(place, kept), place.chunks.start, place.chunks.stop
        starts, ends = states[:, start].unbind(0), (states[:, stop] if stop < n_chunks else new_ssm).unbind(0)
        for i, layer in enumerate(layers):
            add_and_norm(x, update if i else None, layer.norm, totals[i], normed[i])
            torch.mm(normed[i], layer.in_proj_t, out=xz[i])
            write_rows(layer.inputs, layer.conv_state, order, layer.write, layer.u, written[i].projected, place.group.writes)
            scan(z[i], gate, written[i], layer.write, starts[i], gated[i], ends[i])
            torch.mm(y[i], layer.out_proj_t, out=update)
            x = totals[i]
        new = None if slots is None else kept.slots[run.n_slots :][place.writes].flatten(0, 1)
        add_and_norm(x, update, weights.norm_f, totals[n_layers], new, slots_by_time[place.writes])
    conv_states(kept.xz[..., :inner], inputs.conv_state, order, new_conv)
    return new_slots, new_conv, new_ssm, pool_weights, buffer
