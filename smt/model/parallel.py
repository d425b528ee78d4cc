"""The parallel path: rows that start at the same step run any number of tokens in one pass, each up to its own end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smt.model.decoder import Decoder
from smt.model.memory import StrideMemory
from smt.model.readout import read_out
from smt.model.windows import Span
from smt.runtime.device import from_host
from smt.runtime.precision import dtype_of_products
from smt.state.layout import existing
from smt.state.rings import ends, from_ring, last_entries, to_ring
from smt.state.state import SMTState


@dataclass(frozen=True, eq=False)
class Encoded:
    """What encoding tokens gives.

    Attributes:
        hidden: (B, T, d) after the decoder's final norm, with what the newest slot adds.
        state: the state of every row after its last token.
        weights: (B, K, W) pooling weights of the writes, zeros behind those of a row with fewer than K; None if not asked for.
    """

    hidden: Tensor
    state: SMTState
    weights: Tensor | None


def encode_chunk(
    memory: StrideMemory,
    decoder: Decoder,
    embedded: Tensor,
    state: SMTState,
    counts: Sequence[int],
    *,
    keep_keys: bool,
    return_weights: bool,
) -> Encoded:
    """Encode embedded tokens (B, T, d), of which row r takes the first counts[r] >= 1; what follows does not change the row.

    All rows of ``state`` are at one step. Attention is causal, so only what a row carries on must end at its own last token.

    On the host steps are counted from the canonical one (``WindowSpec.canonical_step``), so that a piece of a sequence calls
    what an earlier one of its kind has called, with the same numbers; where in the sequence it is, only the device knows.

    Args:
        keep_keys: in ``stride`` and ``token``, whether the state is to have keys and values for single steps.
    """
    config, window, device = decoder.config, decoder.config.window, embedded.device
    first = window.canonical_step(state.step, config.write_group)
    stops = [first + count for count in counts]
    written, *slot_stops = (window.writes_made(stop) if config.writes else 0 for stop in (first, *stops))
    writes = range(written, max(slot_stops))
    gate = None
    if len(set(slot_stops)) > 1:
        gate = from_host([[write < stop for write in writes] for stop in slot_stops], device)

    n_tokens, n_slots = existing(config, first)
    step = state.device_steps[:1]
    slot = window.writes_made(step)  # the next one's index
    before = from_ring(state.tokens, step, n_tokens)
    tokens = Span(torch.cat([before, embedded], dim=1) if n_tokens else embedded, first - n_tokens)
    old_slots = from_ring(state.slots, slot, n_slots)
    new = memory(
        tokens.values,
        old_slots,
        state.conv,
        state.ssm,
        first_step=tokens.first,
        writes=writes,
        gate=gate,
        return_weights=return_weights,
    )
    slots = Span(torch.cat([old_slots, new.slots], dim=1) if n_slots else new.slots, written - n_slots)

    # Where each row ends, among the tokens and slots at hand and in the whole sequence.
    end, slot_end = ends(tokens.first, stops, device), ends(slots.first, slot_stops, device)
    stop, slot_stop = step + (end - n_tokens), slot + (slot_end - n_slots)
    if config.encoding == "stream":
        hidden, kv_tokens, kv_slots = decoder.encode_stream(
            Span(embedded, first),
            Span(new.slots, written),
            _held(state, step, slot, n_tokens, n_slots),
            step,
            stops,
            slot_stops,
        )
        kv_tokens = to_ring(kv_tokens, stop, dim=3)
        kv_slots = state.kv_slots.clone() if kv_slots is None else to_ring(kv_slots, slot_stop, dim=3)
    else:
        hidden, keys = decoder.encode_windows(tokens, slots, first, stops, keep=keep_keys)
        without = state.without_keys()
        kv_tokens, kv_slots = keys or (without.kv_tokens, without.kv_slots)
    if config.reads_out and config.writes:
        hidden = read_out(decoder.slot_readout, Span(hidden, first), slots, window)
    next_state = SMTState(
        config=config,
        steps=tuple(step + count for step, count in zip(state.steps, counts, strict=True)),
        device_steps=stop.expand(len(counts)),
        tokens=to_ring(last_entries(tokens.values, end, config.m_input_tokens), stop),
        slots=to_ring(last_entries(slots.values, slot_end, config.n_state_slots), slot_stop) if writes else state.slots.clone(),
        # Copies: of a state that may be overwritten, where nothing is written, or of what a recorded graph overwrites.
        conv=new.conv.clone(),
        ssm=new.ssm.clone(),
        kv_tokens=kv_tokens,
        kv_slots=kv_slots,
    )
    weights = new.weights
    if weights is not None and gate is not None:
        weights = weights * gate[..., None]
    return Encoded(hidden, next_state.cast_like(state), weights)


def _held(state: SMTState, step: Tensor, slot: Tensor, n_tokens: int, n_slots: int) -> tuple[Tensor, Tensor]:
    """The decoder's keys and values of the last tokens and slots of ``stream``, oldest first."""
    n_slots = min(n_slots, state.config.n_ssm_outputs)
    return from_ring(state.kv_tokens, step, n_tokens, dim=3), from_ring(state.kv_slots, slot, n_slots, dim=3)


def initial_state(decoder: Decoder, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> SMTState:
    """The state before the first token, as the model computes here: under autocast keys and values are in its dtype.

    Args:
        device, dtype: of the embeddings.
    """
    config = decoder.config
    like = torch.empty((), device=device, dtype=dtype)
    state = SMTState.initial(config, batch_size, device=device, dtype=dtype, attention_dtype=dtype_of_products(like))
    if config.empty_slots == "mask" or config.encoding != "stream":
        return state
    # "zero" in the stream: the entries before the first step are zero vectors that have gone through the layers.
    n_tokens, n_slots = existing(config, 0)
    tokens = Span(state.tokens, -n_tokens)
    slots = Span(state.slots[:, config.n_state_slots - n_slots :], -n_slots)
    nothing, before = [0] * batch_size, state.device_steps[:1] - n_tokens
    held = _held(state, state.device_steps, state.device_steps, 0, 0)
    _, kv_tokens, kv_slots = decoder.encode_stream(tokens, slots, held, before, nothing, nothing)
    return replace(state, kv_tokens=kv_tokens, kv_slots=state.kv_slots if kv_slots is None else kv_slots).cast_like(state)
