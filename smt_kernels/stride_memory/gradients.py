"""The memory's writes in Triton, backward: groups and layers from the last to the first.

    group     final RMSNorm (launch)
    layer     W_out (product);   gate, scan, its share of W_dt (launch);   sums of the shares (launch);   W_x, convolution
              (launch);   W_in (product);   RMSNorm, residual (launch)
    group     du of pooling (launch);   W_k, W_q (products);   slots (launch)
    pass      tokens (launch);   every weight (one product);   sums

Sums over rows, writes and blocks are left as partial sums that each program adds to its own from group to group, in a fixed
order: no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smt_kernels.attention_pool import kernels as pooling
from smt_kernels.attention_pool import reference as pool
from smt_kernels.attention_pool.strips import strips_of
from smt_kernels.launch import ceil_div
from smt_kernels.precision import copied
from smt_kernels.stride_memory.kept import Kept, layout, weight_gradient
from smt_kernels.stride_memory.norm import norm_backward, weight_sums
from smt_kernels.stride_memory.places import Layer, Place, layers_of, packed, places_of, pooled_by, written_of_layers
from smt_kernels.stride_memory.reference import Inputs, MemoryWeights, Pass
from smt_kernels.stride_write.blocks import partial_sums
from smt_kernels.stride_write.conv_states import conv_states_backward
from smt_kernels.stride_write.convolution_backward import convolution_backward, tap_sums
from smt_kernels.stride_write.order import Order, order_of
from smt_kernels.stride_write.scan import scan_block
from smt_kernels.stride_write.scan_backward import ScanGradients, scan_backward


class Gradients(NamedTuple):
    """Of a pass: of activations, as ``Kept`` has them, and the partial sums, which begin with zeros."""

    x: Tensor  # (L + 1, K, B, d)
    xz: Tensor  # (L, K, B, 2 E)
    conv: Tensor  # (L, K, B, E), of what the convolution gives
    dt_product: Tensor  # (L, K, B, E)
    projected: Tensor  # (L, K, B, R + 2 N)
    slots: Tensor  # (n + K, B, d) in fp32
    ssm: Tensor  # (L, B, E, N) in fp32, of the state that is being worked on
    norm: Tensor  # (L + 1, sums, d)
    taps: Tensor  # (L, sums, E, C + 1), and bias
    bias: Tensor  # (L, chunks, B, E)
    a: Tensor  # (L, chunks, B, E, N)
    d: Tensor  # (L, chunks, B, E)


def backward(
    grad_slots: Tensor,
    grad_conv: Tensor | None,
    grad_ssm: Tensor | None,
    grad_pooling: Tensor | None,
    pool_weights: Tensor,
    buffer: Tensor,
    run: Pass,
) -> tuple[Tensor, ...]:
    """Gradients of tokens, slots (empty for None), all weights and both states, each in the dtype of its input."""
    run = Pass.of(run)
    kept = layout("triton", run).of(buffer)
    run = run._replace(weights=packed(run.weights))
    tokens, slots, weights, inputs, *_ = run
    batch, n_slots = len(tokens), run.n_slots
    places = places_of(run.groups(), batch)
    grads = _empty(kept, weights, inputs, places, n_slots)
    grads.slots[n_slots:] = grad_slots.transpose(0, 1)
    grads.ssm.zero_() if grad_ssm is None else grads.ssm.copy_(grad_ssm)
    dropout = None if inputs.dropout is None else inputs.dropout.transpose(0, 1).contiguous()
    kept_of_pool = pool.Kept(*(part.flatten(0, 1) for part in (pool_weights, kept.mean, kept.query, kept.u_pool)))
    of_pool = pooling.PoolGradients.empty(kept_of_pool)
    order, strides_place = order_of(inputs.gate), (1, batch)
    layers = [*zip(layers_of(run, kept), _of_layers(grads, grad_conv), strict=True)]
    for place in reversed(places):
        _layers_backward(place, run, kept, grads, layers, order)
        pooled_from, strips = pooled_by(place, run, kept, dropout)
        grad_pooled = grads.x[0, place.writes].transpose(0, 1)
        grad_weights = None if grad_pooling is None else place.rows_of(grad_pooling)
        of_group = pool.Kept(*(part[place.rows] for part in kept_of_pool))
        grads_of_group = pooling.PoolGradients(*(part[place.rows] for part in of_pool))
        pooling.query_backward(
            grad_pooled, grad_weights, pooled_from, strips, strides_place, run.normalise, of_group, grads_of_group
        )
        if strips.held_slots:
            d_held, only = grads.slots[place.group.slots].transpose(0, 1), strips._replace(held_tokens=0)
            pooling.entries_backward(
                grad_pooled,
                pooled_from,
                only,
                strides_place,
                run.normalise,
                of_group,
                grads_of_group,
                d_held,
                d_held,
                adds=True,
            )
    d_tokens = tokens.new_empty(tokens.shape)
    pooled_from = pool.Inputs(tokens, None if slots is None else tokens[:, :0], weights.w_q, weights.w_k, None, dropout)
    strips = strips_of(pooled_from, run.window, run.timeline)
    grad_pooled = grads.x[0].transpose(0, 1)
    pooling.entries_backward(
        grad_pooled, pooled_from, strips, strides_place, run.normalise, kept_of_pool, of_pool, d_tokens, d_tokens
    )
    d_conv = inputs.conv_state.new_empty(inputs.conv_state.shape)
    conv_states_backward(grads.conv, grad_conv, order, weights.conv_weight, d_conv)
    d_slots = tokens.new_empty(0) if slots is None else copied(grads.slots[:n_slots].transpose(0, 1), slots)
    of_weights = _of_weights(kept, grads, kept_of_pool, of_pool, weights)
    return d_tokens, d_slots, *of_weights, d_conv, copied(grads.ssm, inputs.ssm_state)


class LayerGradients(NamedTuple):
    """Of all groups in one layer."""

    inputs: Tensor  # (K, B, E), of the convolution
    conv: Tensor  # (K, B, E)
    ssm: Tensor  # (B, E, N)
    taps: Tensor  # (sums, E, C + 1)
    new_conv: Tensor | None  # (B, E, C - 1), of the conv state after all writes


def _of_layers(grads: Gradients, grad_conv: Tensor | None) -> list[LayerGradients]:
    stacked = grads.xz[..., : grads.conv.shape[-1]], grads.conv, grads.ssm, grads.taps
    of_new = [None] * len(grads.conv) if grad_conv is None else grad_conv.unbind(0)
    return [LayerGradients(*of_layer) for of_layer in zip(*(part.unbind(0) for part in stacked), of_new, strict=True)]


def _layers_backward(
    place: Place,
    run: Pass,
    kept: Kept,
    grads: Gradients,
    layers: list[tuple[Layer, LayerGradients]],
    order: Order | None,
) -> None:
    """From the gradients of the slots of one group to those of what is pooled."""
    _, inner, n_state = run.weights.a.shape
    n_writes, batch = len(place.group.writes), grads.ssm.shape[1]
    chunks = place.chunks.stop - place.chunks.start
    blocks = ceil_div(inner, scan_block("scan_backward", chunks * batch, inner, n_state, grads.x.device))
    gate = None if run.inputs.gate is None else run.inputs.gate[:, place.writes]
    d_slots = grads.slots[run.n_slots :][place.writes].flatten(0, 1)
    d_x, d_normed = torch.empty_like(d_slots), grads.x.new_empty(d_slots.shape)
    d_y = grads.x.new_empty(n_writes, batch, inner)
    d_y_rows, partials = d_y.flatten(0, 1), partial_sums(d_x, blocks, n_writes, batch, kept.projected.shape[3])
    totals, of_x, of_xz = (place.rows_of_layers(of) for of in (kept.x, grads.x, grads.xz))
    z, of_z = (place.writes_of_layers(of[..., inner:]) for of in (kept.xz, grads.xz))
    of_u, of_dt, of_projected = map(place.writes_of_layers, (grads.conv, grads.dt_product, grads.projected))
    of_norm = grads.norm[:, : weight_sums(len(d_x))].unbind(0)
    of_bias, of_a, of_d = (part[:, :chunks].unbind(0) for part in (grads.bias, grads.a, grads.d))
    written, starts = written_of_layers(place, kept), kept.starts[:, place.chunks].mT.unbind(0)
    norm_backward(d_slots, totals[-1], run.weights.norm_f, None, d_x, of_x[-1], of_norm[-1])
    for i, (layer, of_layer) in reversed([*enumerate(layers)]):
        torch.mm(of_x[i + 1], layer.out_proj, out=d_y_rows)
        of_scan = ScanGradients(of_z[i], of_u[i], of_dt[i], partials, of_layer.ssm, of_bias[i], of_a[i], of_d[i])
        scan_backward(d_y, of_layer.ssm, z[i], gate, written[i], layer.write, starts[i], of_scan, adds=True)
        convolution_backward(
            layer.inputs,
            layer.conv_state,
            order,
            layer.write,
            partials,
            of_layer.new_conv,
            of_layer.conv,
            of_projected[i],
            of_layer.inputs,
            of_layer.taps,
            place.group.writes,
            adds=True,
        )
        torch.mm(of_xz[i], layer.in_proj, out=d_normed)
        norm_backward(d_normed, totals[i], layer.norm, d_x, d_x, of_x[i], of_norm[i])


def _empty(kept: Kept, weights: MemoryWeights, inputs: Inputs, places: list[Place], n_slots: int) -> Gradients:
    layers, inner, n_state = weights.a.shape
    _, n_writes, batch, width = kept.x.shape
    longest = max(len(place.group.writes) for place in places)
    chunks = max(place.chunks.stop - place.chunks.start for place in places)
    # One memory of zeros for all sums.
    shapes = {
        "slots": (n_slots + n_writes, batch, width),
        "norm": (layers + 1, weight_sums(longest * batch), width),
        "taps": (
            layers,
            max(tap_sums(len(place.group.writes), batch) for place in places),
            inner,
            weights.conv_weight.shape[2] + 1,
        ),
        "bias": (layers, chunks, batch, inner),
        "a": (layers, chunks, batch, n_state, inner),
        "d": (layers, chunks, batch, inner),
    }
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    zeros = kept.x.new_zeros(sum(sizes)).split(sizes)
    sums = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), zeros, strict=True)}
    sums["a"] = sums["a"].mT
    return Gradients(
        x=kept.normed.new_empty(kept.x.shape),
        xz=torch.empty_like(kept.xz),
        conv=torch.empty_like(kept.u),
        dt_product=torch.empty_like(kept.u),
        projected=kept.u.new_empty(kept.projected.shape),
        ssm=torch.empty_like(kept.starts[:, 0]).mT,
        **sums,
    )


def _of_weights(
    kept: Kept, grads: Gradients, kept_of_pool: pool.Kept, of_pool: pooling.PoolGradients, weights: MemoryWeights
) -> list[Tensor]:
    """Those of ``MemoryWeights``: one product for all layers and writes, or the sum of partial sums."""
    low = kept.projected[..., : weights.dt_proj.shape[2]].to(kept.u.dtype)
    found = MemoryWeights(
        *pooling.projections_backward(kept_of_pool, of_pool),
        norm=grads.norm[:-1].sum(1),
        in_proj=weight_gradient(grads.xz, kept.normed),
        conv_weight=grads.taps[..., :-1].sum(1),
        conv_bias=grads.taps[..., -1].sum(1),
        x_proj=weight_gradient(grads.projected, kept.u),
        dt_proj=weight_gradient(grads.dt_product, low),
        dt_bias=grads.bias.sum((1, 2)),
        a=grads.a.sum((1, 2)),
        d=grads.d.sum((1, 2)),
        out_proj=weight_gradient(grads.x[1:], kept.y),
        norm_f=grads.norm[-1].sum(0),
    )
    return [grad.to(weight.dtype).contiguous() for grad, weight in zip(found, weights, strict=True)]
