"""The decoder: GPT-2 blocks over the window, in three encodings of falling cost (DESIGN 2.2).

``token`` and ``stride`` cut the sequence into windows and encode each on its own; ``stream`` runs slots and tokens through the
layers once, and every token attends to the keys and values of its window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.config import SMTConfig
from smt.rotary import Rotation, rotate, rotation
from smt.state import KeyValues, keep_last
from smt_kernels import WindowSpec, stream_attention, window_attention

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Span:
    """Consecutive entries: values (B, L, d), and the step (of a token) or index (of a slot) of the first."""

    values: Tensor
    first: int

    @property
    def stop(self) -> int:
        """One past the last index."""
        return self.first + self.values.shape[1]


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

    def encode_windows(self, tokens: Span, slots: Span, first: int) -> Tensor:
        """Encode steps ``first`` to the end of ``tokens``, each inside its window (``token`` and ``stride``).

        Args:
            tokens: (B, T, d) embeddings, at least n_tokens - 1 steps of history before ``first`` where they exist.
            slots: (B, K, d), all that any of the steps sees.
            first: the first step to encode.

        Returns:
            (B, tokens.stop - first, d), after the final norm.
        """
        layout = _window_layout(self.config, first, tokens.stop)
        x, valid_memory, valid_tokens = _cut_windows(self.config, layout, tokens, slots)
        x = self.dropout(x + self.positions[: x.shape[1]])
        for index, block in enumerate(self.blocks):
            # Nothing reads the last layer's output but at the queries.
            tail = layout.tail if index == len(self.blocks) - 1 else x.shape[1]
            normed = block.norm_1(x)
            q, k, v = block.attention.heads(normed)
            attended = window_attention(
                q,
                k,
                v,
                n_memory=self.config.n_ssm_outputs,
                valid_memory=valid_memory,
                valid_tokens=valid_tokens,
                tail=tail,
            )
            x = block.finish(x[:, -tail:], attended)
        batch = tokens.values.shape[0]
        queries = x.reshape(batch, -1, self.config.d_model)  # every window's queries, in order of their steps
        return self.norm(queries[:, layout.skip : layout.skip + tokens.stop - first])

    def encode_stream(
        self, tokens: Span, slots: Span, held: tuple[KeyValues, ...], n_held: tuple[int, int]
    ) -> tuple[Tensor, tuple[KeyValues, ...]]:
        """Encode new tokens and new slots on top of the keys and values that each layer holds (``stream``).

        Args:
            tokens: (B, T, d) embeddings of the new steps.
            slots: (B, K, d) the new slots.
            held: per layer, the keys and values of earlier tokens and slots.
            n_held: how many tokens and slots of ``held`` exist.

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
        for index, (block, layer) in enumerate(zip(self.blocks, held, strict=True)):
            last = index == len(self.blocks) - 1
            q, k, v = _rotated_heads(block, x, turn)
            slot_k = torch.cat([_newest(layer.slot_k, n_held_slots), k[:, :n_slots]], dim=1)
            slot_v = torch.cat([_newest(layer.slot_v, n_held_slots), v[:, :n_slots]], dim=1)
            token_k = torch.cat([_newest(layer.token_k, n_held_tokens), k[:, n_slots:]], dim=1)
            token_v = torch.cat([_newest(layer.token_v, n_held_tokens), v[:, n_slots:]], dim=1)
            attended = stream_attention(
                q[:, n_slots:],
                token_k,
                token_v,
                slot_k,
                slot_v,
                window=config.window,
                first_step=tokens.first - n_held_tokens,
                first_slot=slots.first - n_held_slots,
            )
            if last:
                x = x[:, n_slots:]  # nothing reads the slots' last output
            elif n_slots:
                of_slots = stream_attention(q[:, :n_slots], slot_k, slot_v, window=among_slots)
                attended = torch.cat([of_slots, attended], dim=1)
            x = block.finish(x, attended)
            kept.append(
                KeyValues(
                    keep_last(token_k, config.m_input_tokens),
                    keep_last(token_v, config.m_input_tokens),
                    keep_last(slot_k, config.n_ssm_outputs),
                    keep_last(slot_v, config.n_ssm_outputs),
                )
            )
        return self.norm(x), tuple(kept)


@dataclass(frozen=True)
class _WindowLayout:
    """Which windows encode a run of steps: window i ends at step ends[i] and holds n slots and ``n_tokens`` tokens.

    ``tail`` queries of each window are computed; the first step asked for is query ``skip`` of the first window.
    """

    ends: range
    n_tokens: int
    tail: int
    skip: int


def _window_layout(config: SMTConfig, first: int, stop: int) -> _WindowLayout:
    if config.encoding == "token":
        return _WindowLayout(ends=range(first, stop), n_tokens=config.m_input_tokens, tail=1, skip=0)
    window, stride = config.window, config.stride
    first_block, last_block = window.block_of(first), window.block_of(stop - 1)
    if first_block == last_block:
        # One block, perhaps unfinished: leave out the entries after the last step, which do not exist yet.
        missing = window.block_end(last_block) - (stop - 1)
        return _WindowLayout(ends=range(stop - 1, stop), n_tokens=config.m_input_tokens - missing, tail=stop - first, skip=0)
    ends = range(window.block_end(first_block), window.block_end(last_block) + 1, stride)
    return _WindowLayout(ends=ends, n_tokens=config.m_input_tokens, tail=stride, skip=first - (ends.start - stride + 1))


def _cut_windows(
    config: SMTConfig, layout: _WindowLayout, tokens: Span, slots: Span
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The windows (B * len(ends), n + n_tokens, d) and how many slots and tokens of each exist (None: all, everywhere)."""
    batch, n_windows = tokens.values.shape[0], len(layout.ends)
    start, stop = layout.ends.start - layout.n_tokens + 1, layout.ends[-1] + 1
    padded = F.pad(tokens.values, (0, 0, tokens.first - start, stop - tokens.stop))
    token_windows = padded.unfold(1, layout.n_tokens, layout.ends.step).transpose(2, 3)  # (B, N, n_tokens, d)

    window = config.window
    written = [window.writes_before(end) if config.writes else 0 for end in layout.ends]
    padded = F.pad(slots.values, (0, 0, window.n_memory - (written[0] - slots.first), written[-1] - slots.stop))
    distinct = padded.unfold(1, window.n_memory, 1).transpose(2, 3) if window.n_memory else padded[:, :, None, :0]
    which = torch.tensor(written, device=padded.device) - written[0]
    slot_windows = distinct.index_select(1, which) if window.n_memory else token_windows[:, :, :0]

    windows = torch.cat([slot_windows, token_windows], dim=2).flatten(0, 1)
    slots_held = [min(window.n_memory, count - slots.first) for count in written]
    tokens_held = [min(layout.n_tokens, end + 1 - tokens.first) for end in layout.ends]
    valid = [
        None
        if min(held) == full
        else torch.tensor(held, dtype=torch.int32, device=padded.device).expand(batch, n_windows).flatten()
        for held, full in ((slots_held, window.n_memory), (tokens_held, layout.n_tokens))
    ]
    return windows, valid[0], valid[1]


def _rotated_heads(block: Block, x: Tensor, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = block.attention.heads(block.norm_1(x))
    return rotate(q, turn), rotate(k, turn), v


def _newest(held: Tensor, count: int) -> Tensor:
    return held[:, held.shape[1] - count :]
