"""One decoder layer: a GPT-2 block, and what its attention is between the entries of windows, or along a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.config import SMTConfig
from smt.model.rotary import Rotation, split_and_turn
from smt.state.rings import last_entries
from smt_kernels import WindowSpec, stream_attention, window_attention
from smt_kernels.precision import NORM_EPS

# A fresh gate lets little through, as a fresh slot has nothing to tell, but not none: the memory learns through it. A gate
# is its parameter times the rate, because Adam moves every parameter by about the learning rate, and a gate has far to go.
FRESH_GATE, GATE_RATE = 0.01, 20.0


class Attention(nn.Module):
    """Projections of one attention layer; which entries see which is the caller's business.

    A gate for each head scales the values of slots (``SMTConfig.slot_gate``). A head that has no use for them can close it;
    what attention it gives them then, it withholds from the tokens.
    """

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.n_heads = [config.transformer_n_heads, config.n_kv_heads, config.n_kv_heads]
        self.qkv = nn.Linear(config.d_model, sum(self.n_heads) * config.head_dim)
        self.proj = nn.Linear(config.d_model, config.d_model)
        self.gating = config.slot_gate if config.n_ssm_outputs else "open"
        if self.gating == "learned":
            self.slot_gate = nn.Parameter(torch.empty(config.n_kv_heads, 1))

    def slot_values(self, v: Tensor) -> Tensor:
        """What is attended to of the values v (..., H_kv, D) of slots."""
        if self.gating == "learned":
            if self.slot_gate.is_meta and not v.is_meta:
                raise ValueError("attention.slot_gate is read behind the call of its layer and cannot be offloaded")
            return v * (GATE_RATE * self.slot_gate).to(v.dtype)
        return v if self.gating == "open" else torch.zeros_like(v)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> the heads of queries, keys and values, (B, T, H + 2 H_kv, D)."""
        return self.qkv(x).unflatten(-1, (-1, self.head_dim))

    def split(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``forward`` gives -> q (B, T, H, D), k and v (B, T, H_kv, D)."""
        return heads.split(self.n_heads, dim=-2)

    def split_and_turn(self, heads: Tensor, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """The same with queries and keys turned to their positions."""
        return split_and_turn(heads, self.n_heads, turn)


class Block(nn.Module):
    """A GPT-2 block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model, eps=NORM_EPS)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.d_model, eps=NORM_EPS)
        self.up = nn.Linear(config.d_model, 4 * config.d_model)
        self.down = nn.Linear(4 * config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Run the block, which leaves attention itself to its caller.

        Args:
            x: (B, T, d).
            attend: takes the heads of queries, keys and values of all T entries (``Attention.split``). Returns what the last
                L <= T of them attended to, (B, L, H, D), and what else the caller wants of the block.

        Returns:
            the last L entries after the block, (B, L, d), and the rest of what ``attend`` returned.
        """
        attended, *others = attend(self.attention(self.norm_1(x)))
        x = x[:, x.shape[1] - attended.shape[1] :] + self.dropout(self.attention.proj(attended.flatten(2)))
        x = x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh")))
        return x, *others


class WindowPlace(NamedTuple):
    """Windows of ``n_slots`` slots and some tokens, of which the last ``n_queries`` entries are computed."""

    n_slots: int
    n_queries: int


def window_layer(
    block: Block, x: Tensor, valid_memory: Tensor | None, valid_tokens: Tensor | None, place: WindowPlace
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows x (N, W, d) -> their last entries after the block, and keys and values of all, without gradient.

    Args:
        valid_memory, valid_tokens: (N,) int32, how many of each right-aligned half exist; None: all.
    """

    def attend(heads: Tensor) -> tuple[Tensor, ...]:
        q, k, v = block.attention.split(heads)
        if block.attention.gating != "open":
            of_slots, of_tokens = v.tensor_split([place.n_slots], dim=1)
            v = torch.cat([block.attention.slot_values(of_slots), of_tokens], dim=1)
        attended = window_attention(
            q,
            k,
            v,
            n_memory=place.n_slots,
            valid_memory=valid_memory,
            valid_tokens=valid_tokens,
            tail=place.n_queries,
        )
        return attended, k.detach(), v.detach()

    return block(x, attend)


class StreamPlace(NamedTuple):
    """Where a piece of a stream lies.

    Attributes:
        window: who sees whom.
        n_slots: new slots, which stand before the new tokens.
        first_step, first_slot: of the first token and the first slot that are held or new.
        end, slot_end: where each row ends among the tokens and the slots that are held and new (``smt.state.rings.ends``).
        slots_go_on: whether a later layer reads the slots.
    """

    window: WindowSpec
    n_slots: int
    first_step: int
    first_slot: int
    end: int | Tensor
    slot_end: int | Tensor
    slots_go_on: bool


def stream_layer(
    block: Block, x: Tensor, turn: Rotation, held_tokens: Tensor, held_slots: Tensor, place: StreamPlace
) -> tuple[Tensor, ...]:
    """New slots and tokens x (B, n_slots + T, d) -> the same after the block, and what it holds next.

    Args:
        turn: of their positions.
        held_tokens, held_slots: (2, B, entries, H_kv, D) keys and values of tokens and of slots before, oldest first.

    Returns:
        (B, n_slots + T, d), or without slots that do not go on; the last entries held, (2, B, m, H_kv, D), and, if there are
        new slots, (2, B, n, H_kv, D).
    """
    window, n_slots = place.window, place.n_slots

    def attend(heads: Tensor) -> tuple[Tensor, ...]:
        q, k, v = block.attention.split_and_turn(heads, turn)
        slot_k = slot_v = None
        if n_slots:
            slot_k, k = k.tensor_split([n_slots], dim=1)
            slot_v, v = v.tensor_split([n_slots], dim=1)
            slot_q, q = q.tensor_split([n_slots], dim=1)
            slot_v = block.attention.slot_values(slot_v)
        k, v = _behind(held_tokens, k, v)
        slot_k, slot_v = _behind(held_slots, slot_k, slot_v)
        seen = {"window": window, "first_step": place.first_step, "first_slot": place.first_slot}
        attended = stream_attention(q, k, v, slot_k, slot_v, **seen)
        if n_slots and place.slots_go_on:
            among_slots = WindowSpec(0, max(1, window.n_memory), None)
            attended = torch.cat([stream_attention(slot_q, slot_k, slot_v, window=among_slots), attended], dim=1)
        of_tokens = _last(k, v, place.end, window.n_tokens)
        if not n_slots:
            return attended, of_tokens
        return attended, of_tokens, _last(slot_k, slot_v, place.slot_end, window.n_memory)

    return block(x, attend)


def _behind(held: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """New keys and values behind those that are held, if any are."""
    if k is None:
        return tuple(held) if held.shape[2] else (None, None)
    if not held.shape[2]:
        return k, v
    return torch.cat([held[0], k], dim=1), torch.cat([held[1], v], dim=1)


def _last(k: Tensor, v: Tensor, end: int | Tensor, size: int) -> Tensor:
    return torch.stack([last_entries(k, end, size), last_entries(v, end, size)])
