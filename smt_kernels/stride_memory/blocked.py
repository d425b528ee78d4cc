"""The memory's writes in plain PyTorch, with their own backward, out of the blocked forms of both parts; runs on any device.

Time comes first, (K, B, d), so that the rows of a group lie together and every weight gradient is one product over all groups.
The weight of a norm is a factor of the columns of the projection behind it:

    normed = x r;   x, z = (W_in norm) normed;   x = x + W_out write(x, z);   r = rsqrt(mean(x^2) + eps)
    dx = residual + r (g - normed mean(g normed)),  g = (W_in norm)^T (dx, dz)
    dW_in = P norm,  dnorm = sum of the columns of P W_in,  P = (dx, dz)^T normed over all writes
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smt_kernels.attention_pool import blocked as pooling
from smt_kernels.attention_pool import reference as pool
from smt_kernels.precision import NORM_EPS, accumulation, copied
from smt_kernels.stride_memory.kept import Kept, chunks_of, layout, weight_gradient
from smt_kernels.stride_memory.reference import Group, MemoryWeights, Pass
from smt_kernels.stride_write.blocked import Moves, moves_of, write, write_backward
from smt_kernels.stride_write.kept import KeptBlocked


def forward(run: Pass) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slots (B, K, d), both states after K writes, pooling weights (K, B, W), and what ``backward`` needs."""
    tokens, slots, weights, inputs, *_ = run
    wide = MemoryWeights(*map(accumulation, weights))
    buffer, kept = layout("blocked", run).new(run.tokens)
    pool_weights = wide.a.new_empty(run.timeline.n_writes, len(tokens), run.pooled_size)
    at, of_writes = _Places(run._replace(weights=wide), kept, pool_weights), wide.writes()
    in_proj = _normed_in_proj(wide)
    if slots is not None:
        kept.slots[: run.n_slots] = slots.transpose(0, 1)
    conv, ssm = ([accumulation(state) for state in states] for states in inputs[:2])
    new_slots = torch.empty_like(kept.x[0])
    for index, (group, chunks) in enumerate(at.groups()):
        writes = group.part
        pooled, of_pool = pooling.forward(at.pooled_by(group), run.window, group.timeline, run.normalise)
        for part, value in zip(at.of_pool(group), of_pool, strict=True):
            part.copy_(value)
        kept.x[0, writes] = pooled.transpose(0, 1)
        moves = at.moves(group)
        for layer in range(len(conv)):
            x, normed, xz, y = (part[layer, writes] for part in (kept.x, kept.normed, kept.xz, kept.y))
            torch.mul(x, _inverse_rms(x), out=normed)
            torch.mm(normed.flatten(0, 1), in_proj[layer].T, out=xz.flatten(0, 1))
            of_write = at.written(index, group, chunks, layer)
            result, conv[layer], ssm[layer] = write(
                *xz.chunk(2, dim=-1), conv[layer], ssm[layer], of_writes[layer], moves, of_write
            )
            y.copy_(result)
            after = kept.x[layer + 1, writes].flatten(0, 1)
            torch.addmm(x.flatten(0, 1), y.flatten(0, 1), wide.out_proj[layer].T, out=after)
        written, x = new_slots[writes], kept.x[-1, writes]
        torch.mul(x, _inverse_rms(x), out=written).mul_(wide.norm_f)
        if slots is not None:
            kept.slots[run.n_slots :][writes] = written.to(tokens.dtype)
    states = (_stacked(parts, like) for parts, like in zip((conv, ssm), inputs[:2], strict=True))
    return copied(new_slots.transpose(0, 1), weights.norm_f), *states, pool_weights, buffer


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
    tokens, slots, weights, inputs, *_ = run
    kept = layout("blocked", run).of(buffer)
    wide = MemoryWeights(*map(accumulation, weights))
    at, of_writes = _Places(run._replace(weights=wide), kept, pool_weights), wide.writes()
    layers, n_slots = len(wide.a), run.n_slots
    d_tokens = kept.x.new_zeros(tokens.shape)
    d_slots = kept.x.new_zeros(n_slots + run.timeline.n_writes, *kept.x.shape[2:])
    d_slots[n_slots:] = grad_slots.transpose(0, 1)
    grads = _Gradients(*(torch.empty_like(part) for part in (kept.x, kept.xz, kept.projected, kept.u, kept.query, kept.u_pool)))
    small = "conv_weight", "conv_bias", "a", "d"
    sums = wide._replace(**{name: torch.zeros_like(getattr(wide, name)) for name in small})
    conv, ssm = ([None] * layers if grad is None else list(grad) for grad in (grad_conv, grad_ssm))
    in_proj, inverse = _normed_in_proj(wide), _inverse_rms(kept.x)
    normed_last = kept.x[layers] * inverse[layers]
    for index, (group, chunks) in reversed([*enumerate(at.groups())]):
        writes = group.part
        moves = at.moves(group)
        d_x = _normalise_backward(d_slots[n_slots:][writes] * wide.norm_f, normed_last[writes], inverse[layers, writes])
        for layer in reversed(range(layers)):
            grads.x[layer + 1, writes] = d_x
            d_y = (d_x.flatten(0, 1) @ wide.out_proj[layer]).view_as(kept.y[layer, writes])
            z, of_write = kept.xz[layer, writes].chunk(2, dim=-1)[1], at.written(index, group, chunks, layer)
            found = write_backward(d_y, conv[layer], ssm[layer], z, of_write.starts, of_writes[layer], moves, of_write)
            conv[layer], ssm[layer] = found.conv_state.permute(1, 2, 0), found.ssm_state.mT
            d_xz = grads.xz[layer, writes]
            torch.cat([found.x, found.z], dim=-1, out=d_xz)
            grads.projected[layer, writes], grads.dt_input[layer, writes] = found.projected, found.dt_input
            sums.conv_weight[layer].add_(found.conv_weight)
            sums.conv_bias[layer].add_(found.conv.sum((0, 1)))
            sums.a[layer].add_(found.a.mT)
            sums.d[layer].add_(found.d)
            d_normed = (d_xz.flatten(0, 1) @ in_proj[layer]).view_as(d_x)
            d_x = _normalise_backward(d_normed, kept.normed[layer, writes], inverse[layer, writes]).add_(d_x)
        grad_weights = None if grad_pooling is None else grad_pooling[writes].transpose(0, 1)
        d_query, du = pooling.entries_backward(
            d_x.transpose(0, 1),
            grad_weights,
            pool.Kept(*at.of_pool(group)),
            at.pooled_by(group),
            run.window,
            group.timeline,
            run.normalise,
            d_tokens[:, group.tokens],
            None if slots is None else d_slots[group.slots].transpose(0, 1),
        )
        grads.query[writes], grads.u_pool[writes] = d_query.transpose(0, 1), du.transpose(0, 1)
    low, of_in_proj = kept.projected[..., : wide.dt_proj.shape[2]], weight_gradient(grads.xz, kept.normed)
    sums = sums._replace(
        w_q=grads.query.flatten(0, 1).T @ kept.mean.flatten(0, 1),
        w_k=kept.query.flatten(0, 1).T @ grads.u_pool.flatten(0, 1),
        norm=(of_in_proj * wide.in_proj).sum(1),
        in_proj=of_in_proj * wide.norm[:, None],
        x_proj=weight_gradient(grads.projected, kept.u),
        dt_proj=weight_gradient(grads.dt_input, low),
        dt_bias=grads.dt_input.sum((1, 2)),
        out_proj=weight_gradient(grads.x[1:], kept.y),
        norm_f=(d_slots[n_slots:] * normed_last).sum((0, 1)),
    )
    of_slots = tokens.new_empty(0) if slots is None else copied(d_slots[:n_slots].transpose(0, 1), slots)
    of_weights = (grad.to(weight.dtype) for grad, weight in zip(sums, weights, strict=True))
    states = (_stacked(parts, like) for parts, like in zip((conv, ssm), inputs[:2], strict=True))
    return d_tokens.to(tokens.dtype), of_slots, *of_weights, *states


class _Gradients(NamedTuple):
    """Of activations of the whole pass, as they are kept."""

    x: Tensor  # (L + 1, K, B, d)
    xz: Tensor  # (L, K, B, 2 E)
    projected: Tensor  # (L, K, B, R + 2 N)
    dt_input: Tensor  # (L, K, B, E)
    query: Tensor  # (K, B, d_k)
    u_pool: Tensor  # (K, B, d)


class _Places(NamedTuple):
    """Where each group of a pass finds what it takes and keeps."""

    run: Pass
    kept: Kept
    pool_weights: Tensor

    def pooled_by(self, group: Group) -> pool.Inputs:
        """What the windows of a group are pooled from."""
        run = self.run
        slots = None if run.slots is None else self.kept.slots[group.slots].transpose(0, 1).to(run.tokens.dtype)
        dropout = run.inputs.dropout
        dropout = None if dropout is None else dropout[:, group.part]
        return pool.Inputs(run.tokens[:, group.tokens], slots, run.weights.w_q, run.weights.w_k, None, dropout)

    def of_pool(self, group: Group) -> list[Tensor]:
        """What pooling keeps of a group, (B, K, .)."""
        parts = self.pool_weights, self.kept.mean, self.kept.query, self.kept.u_pool
        return [part[group.part].transpose(0, 1) for part in parts]

    def moves(self, group: Group) -> Moves | None:
        gate = self.run.inputs.gate
        return moves_of(None if gate is None else gate[:, group.part])

    def groups(self) -> list[tuple[Group, slice]]:
        """The groups of the pass, and which chunks of the scan each has."""
        groups = self.run.groups()
        return [*zip(groups, chunks_of(groups), strict=True)]

    def written(self, index: int, group: Group, chunks: slice, layer: int) -> KeptBlocked:
        """What ``stride_write`` keeps of a group in one layer, and the states before each of its chunks."""
        kept, start, stop = self.kept, group.writes.start, group.writes.stop
        history = self.run.inputs.conv_state.shape[3]
        inputs = kept.inputs[layer, start + history * index : stop + history * (index + 1)]
        parts = kept.conv, kept.u, kept.projected, kept.dt_input, kept.dt, kept.inner
        return KeptBlocked(inputs, *(part[layer, start:stop] for part in parts), kept.starts[layer, chunks])


def _inverse_rms(x: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()[..., None]


def _normalise_backward(grad: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x (K, B, d) from that of ``normed``, whose memory it takes."""
    along = torch.linalg.vecdot(grad, normed)[..., None]
    return grad.addcmul_(normed, along, value=-1 / grad.shape[-1]).mul_(inverse)


def _normed_in_proj(weights: MemoryWeights) -> Tensor:
    """W_in of every layer, for entries that the weight of its norm has not scaled."""
    return weights.in_proj * weights.norm[:, None]


def _stacked(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(parts).to(like.dtype)
