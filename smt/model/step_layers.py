"""The decoder on one token per row in each of the three encodings, with what each layer keeps.

The functions take the embeddings (B, d) of the new tokens and the state whose ring of tokens already holds them. They return
(B, d) after the final norm and change the tensors of ``state.layers`` in place. Rows that are one token each go through linear
layers as one sequence, (1, B, d).

A step that begins a block, t % S == 1, is the first to see the slot of the write before it. There ``stride`` encodes the window
so far, and ``token`` its slots, which are causal and hence the same for all tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from smt.config import SMTConfig
from smt.model.decoder import Block, Decoder
from smt.model.rotary import Rotation, rotate, rotation
from smt.model.windows import absent_in_block, window_cache
from smt.state.layout import KeyValues, existing
from smt.state.rings import last_entries
from smt.state.state import SMTState
from smt_kernels import stream_attention_decode, window_attention


def decode_stream(decoder: Decoder, embedded: Tensor, state: SMTState) -> Tensor:
    """Every token goes through the layers once, and attends to the rings."""
    config, steps = decoder.config, state.steps
    rows, step, index = _columns(embedded, ((row, step, step % config.m_input_tokens) for row, step in enumerate(steps)))
    n_tokens, n_slots = _counts(embedded, (seen(config, step) for step in steps))
    turn = rotation(step, config.head_dim, config.rope_theta)
    x = embedded[None]
    for block, layer in zip(decoder.blocks, state.layers, strict=True):
        x = _through(block, x, layer, n_tokens, n_slots, rows, index, turn)
    return decoder.norm(x)[0]


def keep_slots(decoder: Decoder, slots: Tensor, state: SMTState, writers: Sequence[int], writes: Sequence[int]) -> None:
    """Run the slots (R, d) of the ``writes`` of the rows ``writers`` through the layers of ``stream``, and keep them there."""
    config = decoder.config
    steps = [config.window.write_step(write) for write in writes]
    rows, step, index = _columns(slots, zip(writers, steps, (write % config.n_ssm_outputs for write in writes), strict=True))
    # A slot sees itself, earlier slots and no tokens.
    n_tokens, n_slots = _counts(slots, ((0, seen(config, step + 1)[1]) for step in steps))
    turn = rotation(step, config.head_dim, config.rope_theta)
    x = (slots + decoder.slot_type)[None]
    everyone = len(writers) == state.batch_size
    for depth, (block, layer) in enumerate(zip(decoder.blocks, state.layers, strict=True), start=1):
        if depth == len(decoder.blocks):  # nothing reads the slots' last output
            _append(block, block.attention(block.norm_1(x)), layer, rows, index, turn, of_slots=True)
        else:
            x = _through(block, x, layer, n_tokens, n_slots, rows, index, turn, of_slots=True, everyone=everyone)


def decode_stride(decoder: Decoder, embedded: Tensor, state: SMTState) -> Tensor:
    """The first token of a block encodes the window so far; the others add their keys and values to those of the window."""
    config, window, steps = decoder.config, decoder.config.window, state.steps
    entering = _entering(config, steps)
    if len(entering) == len(steps):
        return _enter_blocks(decoder, state, entering, config.m_input_tokens - config.stride + 1)
    # All rows run on in their blocks. Those that enter one do so in vain: what this gives and keeps of them is replaced.
    places = []
    for row, step in enumerate(steps):
        in_window = config.m_input_tokens - 1 - (window.block_end(window.block_of(step)) - step)
        absent_tokens, absent_slots = absent_in_block(config, step)
        n_slots = config.n_ssm_outputs
        places.append((row, n_slots + in_window, in_window - absent_tokens, n_slots - absent_slots))
    rows, position, index, n_slots = _columns(embedded, places)
    n_tokens, n_slots = (index + 1).int(), n_slots.int()
    x = (embedded + decoder.positions[position])[None]
    for block, layer in zip(decoder.blocks, state.layers, strict=True):
        x = _through(block, x, layer, n_tokens, n_slots, rows, index)
    hidden = decoder.norm(x)[0]
    if entering:
        hidden[entering] = _enter_blocks(decoder, state, entering, config.m_input_tokens - config.stride + 1)
    return hidden


def decode_token(decoder: Decoder, embedded: Tensor, state: SMTState) -> Tensor:
    """The m tokens of each row's window are encoded anew, on the keys and values of its slots."""
    config, steps = decoder.config, state.steps
    entering = _entering(config, steps)
    if entering and config.n_ssm_outputs:
        _enter_blocks(decoder, state, entering, 0)
    rows, stop = _columns(embedded, ((row, step + 1) for row, step in enumerate(steps)))
    valid_tokens, valid_memory = _valid(embedded, config, steps, config.m_input_tokens)
    x = last_entries(state.tokens, rows, stop, config.m_input_tokens) + decoder.positions[config.n_ssm_outputs :]
    for depth, (block, layer) in enumerate(zip(decoder.blocks, state.layers, strict=True), start=1):
        tail = 1 if depth == len(decoder.blocks) else config.m_input_tokens

        def attend(heads: Tensor, block: Block = block, layer: KeyValues = layer, tail: int = tail) -> tuple[Tensor]:
            q, k, v = block.attention.split(heads)
            attended = window_attention(
                q[:, -tail:],
                torch.cat([layer.slot_k.to(k.dtype), k], dim=1),
                torch.cat([layer.slot_v.to(v.dtype), v], dim=1),
                n_memory=config.n_ssm_outputs,
                valid_memory=valid_memory,
                valid_tokens=valid_tokens,
                tail=tail,
            )
            return (attended,)

        (x,) = block(x, attend)
    return decoder.norm(x)[:, 0]


def seen(config: SMTConfig, step: int) -> tuple[int, int]:
    """How many tokens and slots of the window of ``step`` exist."""
    return existing(config, step + 1)[0], min(existing(config, step)[1], config.n_ssm_outputs)


def _enter_blocks(decoder: Decoder, state: SMTState, entering: Sequence[int], n_tokens: int) -> Tensor:
    """Encode slots and the last ``n_tokens`` tokens of the rows ``entering`` and keep them: the last entry's output (R, d)."""
    config = decoder.config
    steps = [state.steps[row] for row in entering]
    written = [config.window.writes_before(step) for step in steps]
    rows, stop, slot_stop = _columns(state.tokens, zip(entering, (step + 1 for step in steps), written, strict=True))
    slots = last_entries(state.slots, rows, slot_stop, config.n_ssm_outputs)
    tokens = last_entries(state.tokens, rows, stop, n_tokens)
    valid_tokens, valid_memory = _valid(state.tokens, config, steps, n_tokens)
    hidden, layers = decoder.through_windows(torch.cat([slots, tokens], dim=1), valid_memory, valid_tokens, tail=1)
    for layer, (k, v) in zip(state.layers, layers, strict=True):
        for name, tensor in window_cache(config, k, v, steps).tensors().items():
            getattr(layer, name).index_copy_(0, rows, tensor.to(getattr(layer, name).dtype))
    return hidden[:, 0]


def _through(
    block: Block,
    x: Tensor,
    layer: KeyValues,
    n_tokens: Tensor,
    n_slots: Tensor,
    rows: Tensor,
    index: Tensor,
    turn: Rotation | None = None,
    *,
    of_slots: bool = False,
    everyone: bool = True,
) -> Tensor:
    """The block's output (1, R, d) for x (1, R, d), which is kept at ``index`` of the ``rows`` of what ``layer`` keeps.

    What is x attends to the first ``n_tokens`` and ``n_slots`` (R,) entries that its rows keep, itself among them.
    """

    def attend(heads: Tensor) -> tuple[Tensor]:
        q = _append(block, heads, layer, rows, index, turn, of_slots=of_slots)
        kept = (layer.token_k, layer.token_v, layer.slot_k, layer.slot_v)
        kept = (tensor.to(q.dtype) if everyone else tensor[rows].to(q.dtype) for tensor in kept)
        return (stream_attention_decode(q, *kept, n_tokens=n_tokens, n_slots=n_slots)[None],)

    (x,) = block(x, attend)
    return x


def _append(
    block: Block, heads: Tensor, layer: KeyValues, rows: Tensor, index: Tensor, turn: Rotation | None, *, of_slots: bool
) -> Tensor:
    """Keep the keys and values of heads (1, R, H + 2 H_kv, D); returns the queries (R, H, D)."""
    ring_k, ring_v = (layer.slot_k, layer.slot_v) if of_slots else (layer.token_k, layer.token_v)
    n_kv_heads = ring_k.shape[2]
    q_and_k, v = heads[0, :, :-n_kv_heads], heads[0, :, -n_kv_heads:]
    if turn is not None:
        q_and_k = rotate(q_and_k, turn)
    ring_k[rows, index] = q_and_k[:, -n_kv_heads:].to(ring_k.dtype)
    ring_v[rows, index] = (block.attention.slot_values(v) if of_slots else v).to(ring_v.dtype)
    return q_and_k[:, :-n_kv_heads]


def _entering(config: SMTConfig, steps: Sequence[int]) -> list[int]:
    """The rows whose step begins a block."""
    block_of = config.window.block_of
    return [row for row, step in enumerate(steps) if block_of(step) != block_of(step - 1)]


def _valid(like: Tensor, config: SMTConfig, steps: Sequence[int], n_tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """``valid_tokens`` and ``valid_memory`` of the rows' windows with ``n_tokens`` tokens; None where all entries exist."""
    tokens, slots = zip(*(seen(config, step) for step in steps), strict=True)
    halves = ([min(count, n_tokens) for count in tokens], n_tokens), (slots, config.n_ssm_outputs)
    return tuple(
        None if min(held) == full else torch.tensor(held, dtype=torch.int32, device=like.device) for held, full in halves
    )


def _columns(like: Tensor, rows: Iterable[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Each column of a table of integers, int64 on the device of ``like``, in one transfer."""
    return torch.tensor(list(zip(*rows, strict=True)), device=like.device).unbind()


def _counts(like: Tensor, rows: Iterable[tuple[int, ...]]) -> tuple[Tensor, ...]:
    return tuple(column.int() for column in _columns(like, rows))
