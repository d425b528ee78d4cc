"""The decoder: GPT-2 blocks over the window, in three encodings of falling cost (DESIGN 2.2).

``token`` and ``stride`` cut the sequence into windows and encode each on its own; ``stream`` runs slots and tokens through the
layers once, and every token attends to the keys and values of its window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smt.config import SMTConfig
from smt.model.readout import SlotReadout
from smt.model.rotary import Rotation, rotate, rotation
from smt.model.windows import Span, cut_windows, window_cache, window_layout
from smt.state.layout import KeyValues
from smt.state.rings import from_ring, to_ring
from smt_kernels import WindowSpec, stream_attention, window_attention

NORM_EPS = 1e-5
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
            return v * (GATE_RATE * self.slot_gate).to(v.dtype)
        return v if self.gating == "open" else torch.zeros_like(v)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> the heads of queries, keys and values, (B, T, H + 2 H_kv, D)."""
        return self.qkv(x).unflatten(-1, (-1, self.head_dim))

    def split(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``forward`` gives -> q (B, T, H, D), k and v (B, T, H_kv, D)."""
        return heads.split(self.n_heads, dim=-2)


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


class Decoder(nn.Module):
    """GPT-2 blocks and a final LayerNorm, with learned positions in the window or rotary ones in the stream.

    With ``gradient_checkpointing``, training keeps the input of every block and computes the rest of it again backward.
    ``transformers`` sets it by this name, and with what by the other.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.transformer_n_layers))
        self.norm = nn.LayerNorm(config.d_model, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.slot_readout = SlotReadout(config.d_model, config.d_model, bias=False) if config.reads_out else None
        if config.encoding == "stream":
            self.slot_type = nn.Parameter(torch.empty(config.d_model))
        else:
            self.positions = nn.Parameter(torch.empty(config.window_size, config.d_model))

    def initialise(self) -> None:
        """Fresh weights as in GPT-2: normal, zero biases, residual projections scaled by 1 / sqrt(2 layers)."""
        std = self.config.initializer_std
        for block in self.blocks:
            for linear in (block.attention.qkv, block.attention.proj, block.up, block.down):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)
            for residual in (block.attention.proj, block.down):
                nn.init.normal_(residual.weight, std=std / math.sqrt(2 * len(self.blocks)))
            if block.attention.gating == "learned":
                nn.init.constant_(block.attention.slot_gate, FRESH_GATE / GATE_RATE)
        if self.slot_readout is not None:
            self.slot_readout.reset_parameters()
        nn.init.normal_(self.slot_type if self.config.encoding == "stream" else self.positions, std=std)

    def encode_windows(
        self, tokens: Span, slots: Span, first: int, stops: Sequence[int]
    ) -> tuple[Tensor, tuple[KeyValues, ...]]:
        """Encode steps ``first`` to the end of ``tokens``, each inside its window (``token`` and ``stride``).

        Args:
            tokens: (B, T, d) embeddings, at least n_tokens - 1 steps of history before ``first`` where they exist.
            slots: (B, K, d), all that any of the steps sees.
            first: the first step to encode.
            stops: for each row the step after its last.

        Returns:
            (B, tokens.stop - first, d), after the final norm, and per layer what to keep of each row's last window.
        """
        config, batch = self.config, tokens.values.shape[0]
        layout = window_layout(config, first, tokens.stop)
        windows, valid_memory, valid_tokens = cut_windows(config, layout, tokens, slots)
        of_step = config.window.block_of if config.encoding == "stride" else lambda step: step
        n_windows, first_window = len(layout.ends), of_step(first)
        last = [row * n_windows + of_step(stop - 1) - first_window for row, stop in enumerate(stops)]
        kept = torch.tensor(last, device=windows.device)
        x, layers = self.through_windows(windows, valid_memory, valid_tokens, layout.tail, kept)
        queries = x.reshape(batch, -1, config.d_model)  # every window's queries, in order of their steps
        hidden = queries[:, layout.skip : layout.skip + tokens.stop - first]
        return hidden, tuple(window_cache(config, k, v, [stop - 1 for stop in stops]) for k, v in layers)

    def through_windows(
        self, windows: Tensor, valid_memory: Tensor | None, valid_tokens: Tensor | None, tail: int, kept: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run windows through all layers.

        Args:
            windows: (N, n + L, d) slots and the first L tokens of the window, L <= m.
            valid_memory, valid_tokens: (N,) int32, how many of each right-aligned half exist; None: all.
            tail: how many of the last entries to return.
            kept: int64 indices of the windows whose keys and values to return; None: all.

        Returns:
            (N, tail, d) after the final norm, and per layer keys and values (kept, n + L, H_kv, D), without gradient: only
            decoding reads them.
        """
        x = self.dropout(windows + self.positions[: windows.shape[1]])
        layers = []
        for index, block in enumerate(self.blocks):
            # Nothing reads the last layer's output but at the queries.
            n_queries = tail if index == len(self.blocks) - 1 else x.shape[1]
            x, k, v = self._run(self._window_layer, block, x, valid_memory, valid_tokens, n_queries, kept)
            layers.append((k, v))
        return self.norm(x), layers

    def _window_layer(
        self,
        block: Block,
        x: Tensor,
        valid_memory: Tensor | None,
        valid_tokens: Tensor | None,
        n_queries: int,
        kept: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def attend(heads: Tensor) -> tuple[Tensor, ...]:
            q, k, v = block.attention.split(heads)
            if block.attention.gating != "open":
                of_slots, of_tokens = v.tensor_split([self.config.n_ssm_outputs], dim=1)
                v = torch.cat([block.attention.slot_values(of_slots), of_tokens], dim=1)
            attended = window_attention(
                q,
                k,
                v,
                n_memory=self.config.n_ssm_outputs,
                valid_memory=valid_memory,
                valid_tokens=valid_tokens,
                tail=n_queries,
            )
            return attended, k.detach(), v.detach()

        x, k, v = block(x, attend)
        return (x, k, v) if kept is None else (x, k.index_select(0, kept), v.index_select(0, kept))

    def encode_stream(
        self,
        tokens: Span,
        slots: Span,
        held: tuple[KeyValues, ...],
        n_held: tuple[int, int],
        stops: Sequence[int],
        slot_stops: Sequence[int],
    ) -> tuple[Tensor, tuple[KeyValues, ...]]:
        """Encode new tokens and new slots on top of the keys and values that each layer holds (``stream``).

        Args:
            tokens: (B, T, d) embeddings of the new steps.
            slots: (B, K, d) the new slots.
            held: per layer, rings of the keys and values of earlier tokens and slots.
            n_held: how many tokens and slots of ``held`` exist.
            stops, slot_stops: for each row, the step after its last and the slot after its last.

        Returns:
            (B, T, d) after the final norm, and per layer what to hold next.
        """
        config, n_slots = self.config, slots.values.shape[1]
        n_held_tokens, n_held_slots = n_held
        slot_step = config.window.write_step(torch.arange(slots.first, slots.stop, device=tokens.values.device))
        token_step = torch.arange(tokens.first, tokens.stop, device=tokens.values.device)
        turn = rotation(torch.cat([slot_step, token_step]), config.head_dim, config.rope_theta)
        x = self.dropout(torch.cat([slots.values + self.slot_type, tokens.values], dim=1))
        firsts = tokens.first - n_held_tokens, slots.first - n_held_slots
        of_tokens = partial(to_ring, first=firsts[0], stops=stops, size=config.m_input_tokens)
        of_slots = partial(to_ring, first=firsts[1], stops=slot_stops, size=config.n_ssm_outputs)
        kept = []
        for index, (block, layer) in enumerate(zip(self.blocks, held, strict=True)):
            before = (
                from_ring(layer.token_k, tokens.first, n_held_tokens),
                from_ring(layer.token_v, tokens.first, n_held_tokens),
                from_ring(layer.slot_k, slots.first, n_held_slots),
                from_ring(layer.slot_v, slots.first, n_held_slots),
            )
            last = index == len(self.blocks) - 1
            x, token_k, token_v, slot_k, slot_v = self._run(self._stream_layer, block, x, n_slots, turn, firsts, last, *before)
            kept.append(KeyValues(of_tokens(token_k), of_tokens(token_v), of_slots(slot_k), of_slots(slot_v)))
        return self.norm(x), tuple(kept)

    def _stream_layer(
        self,
        block: Block,
        x: Tensor,
        n_slots: int,
        turn: Rotation,
        firsts: tuple[int, int],
        last: bool,
        *before: Tensor,
    ) -> tuple[Tensor, ...]:
        """x (B, n_slots + T, d) -> the block's output and keys and values of tokens and of slots, behind those ``before``."""

        def attend(heads: Tensor) -> tuple[Tensor, ...]:
            q, k, v = block.attention.split(heads)
            q, k = rotate(q, turn), rotate(k, turn)
            new = k[:, n_slots:], v[:, n_slots:], k[:, :n_slots], block.attention.slot_values(v[:, :n_slots])
            token_k, token_v, slot_k, slot_v = (
                torch.cat([held.to(of_layer.dtype), of_layer], dim=1) for held, of_layer in zip(before, new, strict=True)
            )
            attended = stream_attention(
                q[:, n_slots:],
                token_k,
                token_v,
                slot_k,
                slot_v,
                window=self.config.window,
                first_step=firsts[0],
                first_slot=firsts[1],
            )
            if n_slots and not last:  # nothing reads the slots' last output
                among_slots = WindowSpec(0, max(1, self.config.n_ssm_outputs), None)
                of_slots = stream_attention(q[:, :n_slots], slot_k, slot_v, window=among_slots)
                attended = torch.cat([of_slots, attended], dim=1)
            return attended, token_k, token_v, slot_k, slot_v

        return block(x, attend)

    def _run(self, layer: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *arguments)
        return layer(*arguments)
