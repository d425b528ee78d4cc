"""A layer over a piece of a sequence, and a layer over one token per row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smt.hymba.attention import KeysAndValues, attend, attend_step
from smt.hymba.layers import HymbaLayer, SSMState, SSMWeights
from smt.model.rotary import Rotation, split_and_turn


class Held(NamedTuple):
    """What a layer holds of what came before.

    Attributes:
        tokens: keys, turned to their positions, and values of what it can still see; None: of nothing, or it makes none.
        state: of its SSM.
    """

    tokens: KeysAndValues | None
    state: SSMState


def sequence_layer(
    layer: HymbaLayer,
    x: Tensor,
    turn: Rotation,
    weights: SSMWeights,
    held: Held,
    shared: KeysAndValues | None,
    metas: KeysAndValues | None,
    window: int | None,
    gate: Tensor | None,
) -> tuple[Tensor, Held]:
    """Entries x (B, T, d) -> the same after the layer, and what it holds then.

    Args:
        turn: of their positions.
        weights: of the SSM (``HymbaLayer.prepare``).
        held: from before.
        shared: the layer reads these keys and values, which include those of x, and makes none; None: it makes its own.
        metas: keys and values (1, M, ...) of the meta tokens, where the layer makes or finds its own.
        window: how many tokens it sees; None: all.
        gate: (B, T), which entries the SSM takes; None: all.
    """
    made: list[KeysAndValues] = []

    def attend_to_all(heads: Tensor) -> Tensor:
        q, tokens = queries_and_keys(layer, heads, turn, shared)
        if shared is None:
            if held.tokens is not None:
                tokens = tuple(torch.cat([old.to(q.dtype), new], dim=1) for old, new in zip(held.tokens, tokens, strict=True))
            made.append(tokens)
        return attend(q, tokens, metas, window)

    x, state = layer(x, attend_to_all, held.state, weights, gate)
    return x, Held(made[0] if made else None, state)


def step_layer(
    layer: HymbaLayer,
    x: Tensor,
    turn: Rotation,
    weights: SSMWeights,
    state: SSMState,
    kept: KeysAndValues | None,
    metas: KeysAndValues | None,
    index: Tensor,
    n_tokens: Tensor,
    n_metas: Tensor,
    *,
    makes: bool,
) -> tuple[Tensor, SSMState]:
    """One entry per row, x (B, 1, d) -> the same after the layer, and the state of its SSM.

    Args:
        turn: (B, 1, 1, D) each, of their positions.
        weights: of the SSM (``HymbaLayer.prepare``).
        state: of the SSM before.
        kept: (B, room, ...) keys and values of the tokens that the layer reads.
        metas: (1, M, ...) and of the meta tokens.
        index: (B,) where in each row those of x are kept.
        n_tokens, n_metas: (B,) int32, how many of each there are, x among them.
        makes: whether the layer makes keys and values, and writes them to ``kept``.
    """

    def attend_to_kept(heads: Tensor) -> Tensor:
        q, new = queries_and_keys(layer, heads, turn, None if makes else kept)
        if makes:
            rows = torch.arange(len(index), device=index.device)
            for old, part in zip(kept, new, strict=True):
                old[rows, index] = part[:, 0].to(old.dtype)
        return attend_step(q[:, 0], kept, metas, n_tokens, n_metas)[:, None]

    return layer(x, attend_to_kept, state, weights)


def queries_and_keys(
    layer: HymbaLayer, heads: Tensor, turn: Rotation, shared: KeysAndValues | None
) -> tuple[Tensor, KeysAndValues]:
    """Queries (B, T, H, D), turned, and the keys, turned, and values that they attend to: ``shared``, or the layer's own."""
    q, k, v = split_and_turn(heads, layer.n_heads, turn)
    return q, (k, v.unflatten(2, (k.shape[2], -1))) if shared is None else shared
