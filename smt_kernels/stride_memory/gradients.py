"""The memory's writes in Triton, backward: groups and layers from the last to the first.

    group     final RMSNorm (launch)
    layer     W_out (product);   gate, scan, its share of W_dt (launch);   W_x, convolution (launch);   W_in (product);
              RMSNorm, residual (launch)
    group     du of pooling (launch);   W_k, W_q (products);   slots (launch)
    pass      tokens (launch);   every weight (one product);   sums

Sums over rows, writes and blocks are left as partial sums that each program adds to its own from group to group, in a fixed
order: no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from smt_kernels.attention_pool import kernels as pooling
from smt_kernels.attention_pool import reference as pool
from smt_kernels.attention_pool.reference import Timeline
from smt_kernels.attention_pool.strips import strips_of
from smt_kernels.stride_memory.kept import Kept, kept_of
from smt_kernels.stride_memory.norm import norm_backward, weight_sums
from smt_kernels.stride_memory.places import Place, places_of, pooled_by
from smt_kernels.stride_memory.reference import Inputs, MemoryWeights, groups_of
from smt_kernels.stride_write.blocks import partial_sums
from smt_kernels.stride_write.conv_states import conv_states_backward
from smt_kernels.stride_write.convolution_backward import convolution_backward, tap_sums
from smt_kernels.stride_write.kernels import fewer
from smt_kernels.stride_write.order import Order, order_of
from smt_kernels.stride_write.scan import scan_block
from smt_kernels.stride_write.scan_backward import ScanGradients, scan_backward
from smt_kernels.window import WindowSpec


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
    tokens: Tensor,
    slots: Tensor | None,
    weights: MemoryWeights,
    inputs: Inputs,
    window: WindowSpec,
    timeline: Timeline,
    normalise: bool,
) -> tuple[Tensor, ...]:
    """Gradients of tokens, slots (empty for None), all weights and both states, each in the dtype of its input."""
    weights, inputs, timeline = MemoryWeights(*weights), Inputs(*inputs), Timeline(*timeline)
    kept = kept_of(buffer, "triton", tokens, slots, weights, inputs, window, timeline)
    weights = MemoryWeights(*(weight.contiguous() for weight in weights))
    batch, n_slots = len(tokens), 0 if slots is None else slots.shape[1]
    places = places_of(groups_of(window, timeline, None if slots is None else n_slots), batch)
    grads = _empty(kept, weights, inputs, places, n_slots)
    grads.slots[n_slots:] = grad_slots.transpose(0, 1)
    grads.ssm.zero_() if grad_ssm is None else grads.ssm.copy_(grad_ssm)
    dropout = None if inputs.dropout is None else inputs.dropout.transpose(0, 1).contiguous()
    kept_of_pool = pool.Kept(*(part.flatten(0, 1) for part in (pool_weights, kept.mean, kept.query, kept.u_pool)))
    of_pool = pooling.PoolGradients.empty(kept_of_pool)
    order, strides_place = order_of(inputs.gate), (1, batch)
    for place in reversed(places):
        _layers_backward(place, kept, grads, weights, inputs, grad_conv, order, n_slots)
        pooled_from, strips = pooled_by(place, tokens, kept, weights, dropout, window)
        grad_pooled = grads.x[0, place.writes].transpose(0, 1)
        grad_weights = None if grad_pooling is None else place.rows_of(grad_pooling)
        of_group = pool.Kept(*(part[place.rows] for part in kept_of_pool))
        grads_of_group = pooling.PoolGradients(*(part[place.rows] for part in of_pool))
        pooling.query_backward(
            grad_pooled, grad_weights, pooled_from, strips, strides_place, normalise, of_group, grads_of_group
        )
        if strips.held_slots:
            d_held, only = grads.slots[place.group.slots].transpose(0, 1), strips._replace(held_tokens=0)
            pooling.entries_backward(
                grad_pooled, pooled_from, only, strides_place, normalise, of_group, grads_of_group, d_held, d_held, adds=True
            )
    d_tokens = tokens.new_empty(tokens.shape)
    pooled_from = pool.Inputs(tokens, None if slots is None else tokens[:, :0], weights.w_q, weights.w_k, None, dropout)
    strips = strips_of(pooled_from, window, timeline)
    grad_pooled = grads.x[0].transpose(0, 1)
    pooling.entries_backward(
        grad_pooled, pooled_from, strips, strides_place, normalise, kept_of_pool, of_pool, d_tokens, d_tokens
    )
    d_conv = inputs.conv_state.new_empty(inputs.conv_state.shape)
    conv_states_backward(grads.conv, grad_conv, order, weights.conv_weight, d_conv)
    d_slots = tokens.new_empty(0) if slots is None else _copied(grads.slots[:n_slots].transpose(0, 1), slots)
    of_weights = _of_weights(kept, grads, kept_of_pool, of_pool, weights)
    return d_tokens, d_slots, *of_weights, d_conv, grads.ssm.to(inputs.ssm_state.dtype)


def _layers_backward(
    place: Place,
    kept: Kept,
    grads: Gradients,
    weights: MemoryWeights,
    inputs: Inputs,
    grad_conv: Tensor | None,
    order: Order | None,
    n_slots: int,
) -> None:
    """From the gradients of the slots of one group to those of what is pooled."""
    layers, inner, n_state = weights.a.shape
    n_writes, batch = len(place.group.writes), grads.ssm.shape[1]
    blocks = triton.cdiv(inner, scan_block("scan_backward", n_writes, n_state, grads.x.device))
    chunks = place.chunks.stop - place.chunks.start
    gate = None if inputs.gate is None else inputs.gate[:, place.writes]
    d_slots = grads.slots[n_slots:][place.writes].flatten(0, 1)
    d_x, d_normed = torch.empty_like(d_slots), grads.x.new_empty(d_slots.shape)
    d_y = grads.x.new_empty(n_writes, batch, inner)
    sums = weight_sums(len(d_x))
    of_x = [place.rows_of(grads.x[layer]) for layer in range(layers + 1)]
    norm_backward(d_slots, place.rows_of(kept.x[layers]), weights.norm_f, None, d_x, of_x[layers], grads.norm[layers, :sums])
    for layer in reversed(range(layers)):
        of_write = weights.write(layer)
        torch.mm(of_x[layer + 1], weights.out_proj[layer], out=d_y.flatten(0, 1))
        of_scan = ScanGradients(
            z=grads.xz[layer, place.writes, :, inner:],
            u=grads.conv[layer, place.writes],
            dt_product=grads.dt_product[layer, place.writes],
            projected=partial_sums(d_x, blocks, n_writes, batch, weights.x_proj.shape[1]),
            ssm_state=grads.ssm[layer],
            bias=grads.bias[layer, :chunks],
            a=grads.a[layer, :chunks],
            d=grads.d[layer, :chunks],
        )
        z, starts = kept.xz[layer, place.writes, :, inner:], kept.starts[layer, place.chunks]
        written = place.written(kept, layer)
        scan_backward(d_y, grads.ssm[layer], z, gate, written, of_write, starts, of_scan, adds=True)
        convolution_backward(
            kept.xz[layer, ..., :inner],
            inputs.conv_state[layer],
            order,
            of_write,
            fewer(of_scan.projected),
            None if grad_conv is None else grad_conv[layer],
            grads.conv[layer],
            grads.projected[layer, place.writes],
            grads.xz[layer, ..., :inner],
            grads.taps[layer],
            place.group.writes,
            adds=True,
        )
        torch.mm(place.rows_of(grads.xz[layer]), weights.in_proj[layer], out=d_normed)
        total = place.rows_of(kept.x[layer])
        norm_backward(d_normed, total, weights.norm[layer], d_x, d_x, of_x[layer], grads.norm[layer, :sums])


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
        "a": (layers, chunks, batch, inner, n_state),
        "d": (layers, chunks, batch, inner),
    }
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    zeros = kept.x.new_zeros(sum(sizes)).split(sizes)
    sums = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), zeros, strict=True)}
    return Gradients(
        x=kept.normed.new_empty(kept.x.shape),
        xz=torch.empty_like(kept.xz),
        conv=torch.empty_like(kept.u),
        dt_product=torch.empty_like(kept.u),
        projected=kept.u.new_empty(kept.projected.shape),
        ssm=kept.starts.new_empty(inputs.ssm_state.shape),
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
        in_proj=_product(grads.xz, kept.normed),
        conv_weight=grads.taps[..., :-1].sum(1),
        conv_bias=grads.taps[..., -1].sum(1),
        x_proj=_product(grads.projected, kept.u),
        dt_proj=_product(grads.dt_product, low),
        dt_bias=grads.bias.sum((1, 2)),
        a=grads.a.sum((1, 2)),
        d=grads.d.sum((1, 2)),
        out_proj=_product(grads.x[1:], kept.y),
        norm_f=grads.norm[-1].sum(0),
    )
    return [grad.to(weight.dtype).contiguous() for grad, weight in zip(found, weights, strict=True)]


def _copied(x: Tensor, model: Tensor) -> Tensor:
    return x.to(model.dtype, memory_format=torch.contiguous_format, copy=True)


def _product(grad: Tensor, rows: Tensor) -> Tensor:
    """(L, K, B, out) and (L, K, B, in) -> (L, out, in)."""
    return torch.bmm(grad.flatten(1, 2).mT, rows.flatten(1, 2))
