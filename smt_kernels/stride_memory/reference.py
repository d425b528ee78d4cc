"""The definition of the memory's writes, out of the definitions of its parts; and the tuples that files hand on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smt_kernels.attention_pool.reference import Timeline, attention_pool_sequence
from smt_kernels.operators import unaffected_by_autocast
from smt_kernels.precision import NORM_EPS
from smt_kernels.stride_write.reference import Weights, stride_write
from smt_kernels.window import WindowSpec


class MemoryWeights(NamedTuple):
    """The weights of pooling and of the L layers behind it; those of all layers are stacked."""

    w_q: Tensor  # (d_k, d)
    w_k: Tensor  # (d_k, d)
    norm: Tensor  # (L, d)
    in_proj: Tensor  # (L, 2 E, d)
    conv_weight: Tensor  # (L, E, C)
    conv_bias: Tensor  # (L, E)
    x_proj: Tensor  # (L, R + 2 N, E)
    dt_proj: Tensor  # (L, E, R)
    dt_bias: Tensor  # (L, E)
    a: Tensor  # (L, E, N), negative
    d: Tensor  # (L, E)
    out_proj: Tensor  # (L, d, E)
    norm_f: Tensor  # (d,)

    def writes(self) -> list[Weights]:
        """What ``stride_write`` takes of each layer."""
        stacked = self.conv_weight, self.conv_bias, self.x_proj, self.dt_proj, self.dt_bias, self.a, self.d
        return [Weights(*of_layer) for of_layer in zip(*(weight.unbind(0) for weight in stacked), strict=True)]


class Inputs(NamedTuple):
    """The other tensors that a pass takes."""

    conv_state: Tensor  # (L, B, E, C - 1)
    ssm_state: Tensor  # (L, B, E, N)
    gate: Tensor | None  # (B, K) bool
    dropout: Tensor | None  # (B, K, W)


class Pass(NamedTuple):
    """A run of writes: all that it takes."""

    tokens: Tensor  # (B, T, d)
    slots: Tensor | None  # (B, n, d), those before the first write; None: none is pooled
    weights: MemoryWeights
    inputs: Inputs
    window: WindowSpec
    timeline: Timeline
    normalise: bool

    @classmethod
    def of(cls, parts: Iterable[Any]) -> Pass:
        """From a pass, or plain tuples instead where compiled ahead of time."""
        tokens, slots, weights, inputs, window, timeline, normalise = parts
        return cls(tokens, slots, MemoryWeights(*weights), Inputs(*inputs), window, Timeline(*timeline), normalise)

    @property
    def n_slots(self) -> int:
        """Slots before the first write."""
        return 0 if self.slots is None else self.slots.shape[1]

    @property
    def pooled_size(self) -> int:
        """Entries that a write pools."""
        return self.window.n_tokens if self.slots is None else self.window.size

    def groups(self) -> list[Group]:
        """The groups of its writes."""
        return groups_of(self.window, self.timeline, None if self.slots is None else self.n_slots)


class Group(NamedTuple):
    """Writes that are pooled together, with what they can see: all counted from where tensors begin."""

    writes: range  # from the first write of the pass
    timeline: Timeline  # of pooling, for the entries below
    tokens: slice
    slots: slice  # of the old slots and the new ones behind them

    @property
    def part(self) -> slice:
        """``writes``, as an index."""
        return slice(self.writes.start, self.writes.stop)


def groups_of(window: WindowSpec, timeline: Timeline, n_slots: int | None) -> list[Group]:
    """The writes of a pass, cut where a group ends; without slots (None), nothing is waited for and all are one group.

    ``n_slots`` old slots are held, from ``timeline.first_slot`` on.
    """
    first, n_writes, size, first_step, first_slot = timeline
    cuts = [0, n_writes] if n_slots is None else [0, *range(size - first % size, n_writes, size), n_writes]
    groups = []
    for start, stop in pairwise(cuts):
        token_start = max(window.visible_tokens(window.write_step(first + start))[0] - first_step, 0)
        token_stop = window.write_step(first + stop - 1) + 1 - first_step
        slot_start = slot_stop = 0
        if n_slots is not None:
            slot_start, slot_stop = (place - first_slot for place in window.pooled_slots(first + start, size))
            slot_start, slot_stop = max(slot_start, 0), max(slot_stop, 0)
        of_group = Timeline(first + start, stop - start, size, first_step + token_start, first_slot + slot_start)
        groups.append(Group(range(start, stop), of_group, slice(token_start, token_stop), slice(slot_start, slot_stop)))
    return groups


@unaffected_by_autocast
def stride_memory(tokens: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the parts of a pass, slots (B, K, d), both states after K writes and the weights of pooling (B, K, W). See the
    package docstring."""
    run = Pass(tokens, *others)
    weights, inputs, held = run.weights, run.inputs, run.slots
    conv, ssm, written, all_pooling = list(inputs.conv_state), list(inputs.ssm_state), [], []
    of_writes = weights.writes()
    for group in run.groups():
        writes = group.part
        x, pooling = attention_pool_sequence(
            tokens[:, group.tokens],
            None if held is None else held[:, group.slots],
            weights.w_q,
            weights.w_k,
            window=run.window,
            timeline=group.timeline,
            normalise=run.normalise,
            dropout_mask=None if inputs.dropout is None else inputs.dropout[:, writes],
        )
        x = x.to(weights.norm_f.dtype)
        gate = None if inputs.gate is None else inputs.gate[:, writes]
        for layer in range(len(conv)):
            normed = _rms_norm(x, weights.norm[layer]).to(tokens.dtype)
            half, z = (normed @ weights.in_proj[layer].T).chunk(2, dim=-1)
            y, conv[layer], ssm[layer] = stride_write(half, z, conv[layer], ssm[layer], of_writes[layer], gate)
            x = x + y @ weights.out_proj[layer].T
        written.append(_rms_norm(x, weights.norm_f))
        all_pooling.append(pooling)
        if held is not None:
            held = torch.cat([held, written[-1].to(tokens.dtype)], dim=1)
    return torch.cat(written, dim=1), torch.stack(conv), torch.stack(ssm), torch.cat(all_pooling, dim=1)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, NORM_EPS)
