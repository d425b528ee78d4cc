"""The decoder on one token per row in each of the three encodings, with what each layer keeps.

The functions take the embeddings (B, d) of the new tokens and the state whose ring of tokens already holds them. They return
(B, d) after the final norm and change the keys and values of the state in place. Rows that are one token each go through linear
layers as one sequence, (1, B, d).

A step that begins a block, t % S == 1, is the first to see the slot of the write before it. There ``stride`` encodes the window
so far, and ``token`` its slots, which are causal and hence the same for all tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from smt.config import SMTConfig
from smt.model.decoder import Decoder
from smt.model.layers import Block
from smt.model.rotary import Rotation, rotation
from smt.model.weights import is_plain
from smt.model.windows import absent_in_block, window_cache
from smt.runtime.device import from_host
from smt.runtime.precision import dtype_of_products
from smt.state.layout import at_most, seen, state_shapes
from smt.state.rings import from_ring
from smt.state.state import SMTState
from smt_kernels import stream_attention_decode, window_attention


def decode_stream(decoder: Decoder, embedded: Tensor, state: SMTState) -> Tensor:
    """Every token goes through the layers once, and attends to the rings."""
    config, step = decoder.config, state.device_steps
    n_tokens, n_slots = (count.int() for count in seen(config, step))
    rows, index = torch.arange(len(step), device=step.device), step % config.m_input_tokens
    x = decoder.dropout(embedded[None])
    turn = _rotation(config, step, x)
    for block, kept in zip(decoder.blocks, _layers(state), strict=True):
        x = _through(block, x, kept, n_tokens, n_slots, rows, index, turn)
    return decoder.norm(x)[0]


def keep_slots(decoder: Decoder, slots: Tensor, state: SMTState, rows: Tensor, write: Tensor) -> None:
    """Run the slots (R, d) of the writes ``write`` (R,) of ``rows`` (R,) through the layers of ``stream``; these keep them."""
    config = decoder.config
    step, index = config.window.write_step(write), write % config.n_ssm_outputs
    # A slot sees itself, earlier slots and no tokens.
    n_slots = seen(config, step + 1)[1].int()
    n_tokens = torch.zeros_like(n_slots)
    x = decoder.dropout((slots + decoder.slot_type)[None])
    turn = _rotation(config, step, x)
    everyone = len(rows) == state.batch_size
    for depth, (block, kept) in enumerate(zip(decoder.blocks, _layers(state), strict=True), start=1):
        if depth == len(decoder.blocks) and is_plain(block, Block):  # nothing reads the slots' last output
            _append(block, block.attention(block.norm_1(x)), kept, rows, index, turn, of_slots=True)
        else:
            x = _through(block, x, kept, n_tokens, n_slots, rows, index, turn, of_slots=True, everyone=everyone)


def decode_stride(decoder: Decoder, embedded: Tensor, state: SMTState) -> Tensor:
    """The first token of a block encodes the window so far; the others add their keys and values to those of the window."""
    config, window, step = decoder.config, decoder.config.window, state.device_steps
    entering = _entering(config, state.steps)
    if len(entering) == len(state.steps):
        return _enter_blocks(decoder, state, entering, step, config.m_input_tokens - config.stride + 1)
    # All rows run on in their blocks. Those that enter one do so in vain: what this gives and keeps of them is replaced.
    in_window = config.m_input_tokens - 1 - (window.block_end(window.block_of(step)) - step)
    absent_tokens, absent_slots = absent_in_block(config, step)
    rows, index = torch.arange(len(step), device=step.device), in_window - absent_tokens
    n_tokens, n_slots = (index + 1).int(), (config.n_ssm_outputs - absent_slots).int()
    x = decoder.dropout((embedded + decoder.positions[config.n_ssm_outputs + in_window])[None])
    for block, kept in zip(decoder.blocks, _layers(state), strict=True):
        x = _through(block, x, kept, n_tokens, n_slots, rows, index)
    hidden = decoder.norm(x)[0]
    if entering:
        hidden[entering] = _enter_blocks(decoder, state, entering, step, config.m_input_tokens - config.stride + 1)
    return hidden


def decode_token(decoder: Decoder, embedded: Tensor, state: SMTState) -> Tensor:
    """The m tokens of each row's window are encoded anew, on the keys and values of its slots."""
    config, step = decoder.config, state.device_steps
    entering = _entering(config, state.steps)
    if entering and config.n_ssm_outputs:
        _enter_blocks(decoder, state, entering, step, 0)
    valid_tokens, valid_memory = _valid(config, step, min(state.steps), config.m_input_tokens)
    x = decoder.dropout(from_ring(state.tokens, step + 1, config.m_input_tokens) + decoder.positions[config.n_ssm_outputs :])
    for depth, (block, (_, (slot_k, slot_v))) in enumerate(zip(decoder.blocks, _layers(state), strict=True), start=1):
        tail = 1 if depth == len(decoder.blocks) else config.m_input_tokens

        def attend(
            heads: Tensor, block: Block = block, slot_k: Tensor = slot_k, slot_v: Tensor = slot_v, tail: int = tail
        ) -> tuple[Tensor]:
            q, k, v = block.attention.split(heads)
            attended = window_attention(
                q[:, -tail:],
                torch.cat([slot_k.to(k.dtype), k], dim=1),
                torch.cat([slot_v.to(v.dtype), v], dim=1),
                n_memory=config.n_ssm_outputs,
                valid_memory=valid_memory,
                valid_tokens=valid_tokens,
                tail=tail,
            )
            return (attended,)

        (x,) = block(x, attend)
    return decoder.norm(x)[:, 0]


def with_keys(decoder: Decoder, state: SMTState) -> SMTState:
    """The state with the keys and values of each row's block so far, which training does not form (``stride``, ``token``)."""
    config = decoder.config
    shapes, like = state_shapes(config), state.kv_slots
    kv_tokens, kv_slots = (like.new_zeros(shapes[name].of(state.batch_size)) for name in ("kv_tokens", "kv_slots"))
    state = replace(state, kv_tokens=kv_tokens, kv_slots=kv_slots)
    # Rows whose last tokens are at one place of their blocks have windows of one length.
    places: dict[int, list[int]] = {}
    for row, step in enumerate(state.steps):
        if step:
            in_block = config.stride - 1 - (config.window.block_end(config.window.block_of(step - 1)) - (step - 1))
            places.setdefault(in_block if config.encoding == "stride" else 0, []).append(row)
    for place, rows in places.items():
        n_tokens = config.m_input_tokens - config.stride + 1 + place if config.encoding == "stride" else 0
        if n_tokens + config.n_ssm_outputs:
            _enter_blocks(decoder, state, rows, state.device_steps - 1, n_tokens, last=-1)
    return state


def _enter_blocks(
    decoder: Decoder, state: SMTState, entering: Sequence[int], step: Tensor, n_tokens: int, last: int = 0
) -> Tensor:
    """Encode the slots and the last ``n_tokens`` tokens of the rows ``entering`` and keep them: the last entry's output (R, d).

    Args:
        step: (B,) the step of the last token, which is ``last`` steps from that of the state.
    """
    config = decoder.config
    everyone = len(entering) == state.batch_size
    rows = None if everyone else from_host(entering, step.device)
    step = step if rows is None else step[rows]
    slots = from_ring(state.slots, config.window.writes_before(step), config.n_ssm_outputs, rows=rows)
    tokens = from_ring(state.tokens, step + 1, n_tokens, rows=rows)
    valid_tokens, valid_memory = _valid(config, step, min(state.steps[row] for row in entering) + last, n_tokens)
    windows = torch.cat([slots, tokens], dim=1)
    hidden, kept = decoder.through_windows(windows, valid_memory, valid_tokens, tail=1, keep=lambda values: values)
    for old, new in zip((state.kv_tokens, state.kv_slots), window_cache(config, kept, step), strict=True):
        if rows is None:
            old.copy_(new)
        else:
            old.index_copy_(2, rows, new.to(old.dtype))
    return hidden[:, 0]


def _layers(state: SMTState) -> list[tuple[Tensor, Tensor]]:
    """What each decoder layer keeps of tokens and of slots: (2, B, entries, H_kv, D) each."""
    return [(state.kv_tokens[index], state.kv_slots[index]) for index in range(state.kv_tokens.shape[0])]


def _through(
    block: Block,
    x: Tensor,
    kept: tuple[Tensor, Tensor],
    n_tokens: Tensor,
    n_slots: Tensor,
    rows: Tensor,
    index: Tensor,
    turn: Rotation | None = None,
    *,
    of_slots: bool = False,
    everyone: bool = True,
) -> Tensor:
    """The block's output (1, R, d) for x (1, R, d), which is kept at ``index`` of the ``rows`` of what the layer keeps.

    What is x attends to the first ``n_tokens`` and ``n_slots`` (R,) entries that its rows keep, itself among them.
    """

    def attend(heads: Tensor) -> tuple[Tensor]:
        q = _append(block, heads, kept, rows, index, turn, of_slots=of_slots)
        of_rows = ((part if everyone else part[:, rows]).to(q.dtype) for part in kept)
        (k, v), (slot_k, slot_v) = of_rows
        return (stream_attention_decode(q, k, v, slot_k, slot_v, n_tokens=n_tokens, n_slots=n_slots)[None],)

    (x,) = block(x, attend)
    return x


def _append(
    block: Block,
    heads: Tensor,
    kept: tuple[Tensor, Tensor],
    rows: Tensor,
    index: Tensor,
    turn: Rotation | None,
    *,
    of_slots: bool,
) -> Tensor:
    """Keep the keys and values of heads (1, R, H + 2 H_kv, D); returns the queries (R, H, D)."""
    q, k, v = block.attention.split(heads) if turn is None else block.attention.split_and_turn(heads, turn)
    if of_slots:
        v = block.attention.slot_values(v)
    of_layer = kept[of_slots]
    of_layer[:, rows, index] = torch.cat([k, v]).to(of_layer.dtype)
    return q[0]


def _rotation(config: SMTConfig, step: Tensor, x: Tensor) -> Rotation:
    return rotation(step, config.head_dim, config.rope_theta, dtype_of_products(x))


def _entering(config: SMTConfig, steps: Sequence[int]) -> list[int]:
    """The rows whose step begins a block."""
    block_of = config.window.block_of
    return [row for row, step in enumerate(steps) if block_of(step) != block_of(step - 1)]


def _valid(config: SMTConfig, step: Tensor, earliest: int, n_tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """``valid_tokens`` and ``valid_memory`` of the windows of ``step`` (R,) with ``n_tokens`` tokens; None where all entries of
    the ``earliest`` of these steps exist, and hence of the others."""
    full = n_tokens, config.n_ssm_outputs
    return tuple(
        None if held >= size else at_most(size, count).int()
        for size, held, count in zip(full, seen(config, earliest), seen(config, step), strict=True)
    )
