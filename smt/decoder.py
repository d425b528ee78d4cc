"""The decoder: GPT-2 blocks over the window, in three encodings of falling cost (DESIGN 2.2).

``token`` and ``stride`` cut the sequence into windows and encode each on its own; ``stream`` runs slots and tokens through the
layers once, and every token attends to the keys and values of its window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.config import SMTConfig
from smt.rings import from_ring, to_ring
from smt.rotary import Rotation, rotate, rotation
from smt.state import KeyValues
from smt.windows import Span, cut_windows, window_cache, window_layout
from smt_kernels import WindowSpec, stream_attention, window_attention

NORM_EPS = 1e-5


class Attention(nn.Module):
    """Projections of one attention layer; which entries see which is the caller's business."""

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.sizes = [config.d_model, config.n_kv_heads * config.head_dim, config.n_kv_heads * config.head_dim]
        self.qkv = nn.Linear(config.d_model, sum(self.sizes))
        self.proj = nn.Linear(config.d_model, config.d_model)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d) -> q (B, T, H, D), k and v (B, T, H_kv, D)."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).split(self.sizes, dim=-1))
        return q, k, v


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

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block after its attention: x (B, T, d), attended (B, T, H, D) -> (B, T, d)."""
        x = x + self.dropout(self.attention.proj(attended.flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh")))


class Decoder(nn.Module):
    """GPT-2 blocks and a final LayerNorm, with learned positions in the window or rotary ones in the stream."""

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.transformer_n_layers))
        self.norm = nn.LayerNorm(config.d_model, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        if config.encoding == "stream":
            self.slot_type = nn.Parameter(torch.empty(config.d_model))
        else:
            self.positions = nn.Parameter(torch.empty(config.window_size, config.d_model))

    def initialise(self) -> None:
        """Fresh weights as in GPT-2: normal, zero biases, residual projections scaled by 1 / sqrt(2 layers)."""
        std = self.config.initializer_range
        for block in self.blocks:
            for linear in (block.attention.qkv, block.attention.proj, block.up, block.down):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)
            for residual in (block.attention.proj, block.down):
                nn.init.normal_(residual.weight, std=std / math.sqrt(2 * len(self.blocks)))
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
            q, k, v = block.attention.heads(block.norm_1(x))
            attended = window_attention(
                q,
                k,
                v,
                n_memory=self.config.n_ssm_outputs,
                valid_memory=valid_memory,
                valid_tokens=valid_tokens,
                tail=n_queries,
            )
            x = block.finish(x[:, -n_queries:], attended)
            k, v = k.detach(), v.detach()
            layers.append((k, v) if kept is None else (k.index_select(0, kept), v.index_select(0, kept)))
        return self.norm(x), layers

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
        among_slots = WindowSpec(0, max(1, config.n_ssm_outputs), None)
        slot_step = config.window.write_step(torch.arange(slots.first, slots.stop, device=tokens.values.device))
        token_step = torch.arange(tokens.first, tokens.stop, device=tokens.values.device)
        turn = rotation(torch.cat([slot_step, token_step]), config.head_dim, config.rope_theta)
        x = self.dropout(torch.cat([slots.values + self.slot_type, tokens.values], dim=1))
        kept = []
        first_step, first_slot = tokens.first - n_held_tokens, slots.first - n_held_slots
        for index, (block, layer) in enumerate(zip(self.blocks, held, strict=True)):
            last = index == len(self.blocks) - 1
            q, k, v = _rotated_heads(block, x, turn)
            slot_k, slot_v = (
                torch.cat([from_ring(ring, slots.first, n_held_slots).to(new.dtype), new[:, :n_slots]], dim=1)
                for ring, new in ((layer.slot_k, k), (layer.slot_v, v))
            )
            token_k, token_v = (
                torch.cat([from_ring(ring, tokens.first, n_held_tokens).to(new.dtype), new[:, n_slots:]], dim=1)
                for ring, new in ((layer.token_k, k), (layer.token_v, v))
            )
            attended = stream_attention(
                q[:, n_slots:],
                token_k,
                token_v,
                slot_k,
                slot_v,
                window=config.window,
                first_step=first_step,
                first_slot=first_slot,
            )
            if last:
                x = x[:, n_slots:]  # nothing reads the slots' last output
            elif n_slots:
                of_slots = stream_attention(q[:, :n_slots], slot_k, slot_v, window=among_slots)
                attended = torch.cat([of_slots, attended], dim=1)
            x = block.finish(x, attended)
            kept.append(
                KeyValues(
                    to_ring(token_k, first_step, stops, config.m_input_tokens),
                    to_ring(token_v, first_step, stops, config.m_input_tokens),
                    to_ring(slot_k, first_slot, slot_stops, config.n_ssm_outputs),
                    to_ring(slot_v, first_slot, slot_stops, config.n_ssm_outputs),
                )
            )
        return self.norm(x), tuple(kept)


def _rotated_heads(block: Block, x: Tensor, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = block.attention.heads(block.norm_1(x))
    return rotate(q, turn), rotate(k, turn), v
