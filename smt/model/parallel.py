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
from smt.state.layout import existing
from smt.state.rings import from_ring, to_ring
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
    memory: StrideMemory, decoder: Decoder, embedded: Tensor, state: SMTState, counts: Sequence[int], *, return_weights: bool
) -> Encoded:
    """Encode embedded tokens (B, T, d), of which row r takes the first counts[r] >= 1; what follows does not change the row.

    All rows of ``state`` are at one step. Attention is causal, so only what a row carries on must end at its own last token.
    """
    config, first = decoder.config, state.step
    stops = [first + count for count in counts]
    written, *slot_stops = (config.window.writes_made(stop) if config.writes else 0 for stop in (first, *stops))
    writes = range(written, max(slot_stops))
    gate = None
    if len(set(slot_stops)) > 1:
        gate = torch.tensor([[write < stop for write in writes] for stop in slot_stops], device=embedded.device)

    n_tokens, n_slots = existing(config, first)
    tokens = Span(torch.cat([from_ring(state.tokens, first, n_tokens), embedded], dim=1), first - n_tokens)
    old_slots = from_ring(state.slots, written, n_slots)
    new = memory(
        tokens.values,
        old_slots,
        torch.stack(state.conv),
        torch.stack(state.ssm),
        first_step=tokens.first,
        first_slot=written - n_slots,
        writes=writes,
        gate=gate,
        return_weights=return_weights,
    )
    slots = Span(torch.cat([old_slots, new.slots], dim=1), written - n_slots)
    if config.encoding == "stream":
        held = min(n_tokens, config.m_input_tokens), min(n_slots, config.n_ssm_outputs)
        hidden, layers = decoder.encode_stream(
            Span(embedded, first), Span(new.slots, written), state.layers, held, stops, slot_stops
        )
    else:
        hidden, layers = decoder.encode_windows(tokens, slots, first, stops)
    if config.reads_out and config.writes:
        steps = torch.arange(first, first + embedded.shape[1], device=embedded.device)
        newest = config.window.writes_before(steps) - 1 - slots.first
        hidden = read_out(decoder.slot_readout, hidden, slots.values, newest[None])
    next_state = SMTState(
        config=config,
        steps=tuple(stops),
        tokens=to_ring(tokens.values, tokens.first, stops, config.m_input_tokens),
        slots=to_ring(slots.values, slots.first, slot_stops, config.n_state_slots),
        conv=new.conv.unbind(),
        ssm=new.ssm.unbind(),
        layers=layers,
    )
    weights = new.weights
    if weights is not None and gate is not None:
        weights = weights * gate[..., None]
    return Encoded(hidden, next_state.cast_like(state), weights)


def initial_state(decoder: Decoder, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> SMTState:
    """The state before the first token, as the model computes here: under autocast keys and values are in its dtype.

    Args:
        device, dtype: of the embeddings.
    """
    config = decoder.config
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    state = SMTState.initial(config, batch_size, device=device, dtype=dtype, attention_dtype=autocast)
    if config.empty_slots == "mask" or config.encoding != "stream":
        return state
    # "zero" in the stream: the entries before the first step are zero vectors that have gone through the layers.
    n_tokens, n_slots = existing(config, 0)
    tokens = Span(state.tokens, -n_tokens)
    slots = Span(state.slots[:, config.n_state_slots - n_slots :], -n_slots)
    before = [0] * batch_size
    _, layers = decoder.encode_stream(tokens, slots, state.layers, (0, 0), before, before)
    return replace(state, layers=layers).cast_like(state)
