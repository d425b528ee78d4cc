"""One token per row, whatever the row's step: append it to the rings, encode it, and write where a row's step is a write step.

Cost and size of everything here are those of the window. The tensors of the state are changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from smt.model.decoder import Decoder
from smt.model.memory import StrideMemory
from smt.model.parallel import Encoded
from smt.model.readout import read_out
from smt.model.step_layers import decode_stream, decode_stride, decode_token, keep_slots
from smt.state.rings import last_entries
from smt.state.state import SMTState
from smt_kernels import attention_pool

_ENCODE = {"stream": decode_stream, "stride": decode_stride, "token": decode_token}


def decode_step(memory: StrideMemory, decoder: Decoder, embedded: Tensor, state: SMTState, *, return_weights: bool) -> Encoded:
    """Take one embedded token per row, (B, 1, d), on top of ``state``, whose tensors it overwrites; no row is at step 0."""
    config, steps, embedded = decoder.config, state.steps, embedded[:, 0]
    newest = [step % config.m_input_tokens for step in steps]
    rows, index = torch.tensor([range(len(steps)), newest], device=embedded.device)
    state.tokens[rows, index] = embedded
    hidden = _ENCODE[config.encoding](decoder, embedded, state)
    if config.reads_out and config.writes:
        written = [config.window.writes_before(step) for step in steps]
        newest = [((count - 1) % config.n_state_slots, min(count, 1) - 1) for count in written]
        index, exists = torch.tensor(list(zip(*newest, strict=True)), device=embedded.device)
        slots = state.slots[rows, index].to(hidden.dtype)
        hidden = read_out(decoder.slot_readout, hidden[:, None], slots[:, None], exists[:, None])[:, 0]
    made = config.window.writes_made
    writers = [row for row, step in enumerate(steps) if config.writes and made(step + 1) > made(step)]
    weights = None
    if return_weights:
        weights = hidden.new_zeros(len(steps), 1 if writers else 0, config.window_size)
    if writers:
        of_writers = _write(memory, decoder, state, writers)
        if return_weights:
            weights[writers, 0, config.window_size - of_writers.shape[1] :] = of_writers.to(weights.dtype)
    return Encoded(hidden[:, None], replace(state, steps=tuple(step + 1 for step in steps)), weights)


def _write(memory: StrideMemory, decoder: Decoder, state: SMTState, writers: Sequence[int]) -> Tensor:
    """Make the write of each row of ``writers``; returns its pooling weights (R, W), without slots (R, m)."""
    config, window = decoder.config, decoder.config.window
    steps = [state.steps[row] for row in writers]
    writes = [window.writes_made(step + 1) - 1 for step in steps]
    slot_stops = [window.pooled_slots(write, config.write_group)[1] for write in writes]
    rows, step, slot_stop = torch.tensor([writers, steps, slot_stops], device=state.tokens.device)

    n_slots = config.n_ssm_outputs if config.pool_source == "window" else 0
    windows = last_entries(state.tokens, rows, step + 1, config.m_input_tokens)
    if n_slots:
        windows = torch.cat([last_entries(state.slots, rows, slot_stop, n_slots), windows], dim=1)
    valid_memory = valid_tokens = None
    if config.empty_slots == "mask" and min(slot_stops) < n_slots:
        valid_memory = slot_stop.clamp(max=n_slots).int()
    if config.empty_slots == "mask" and min(steps) + 1 < config.m_input_tokens:
        valid_tokens = (step + 1).clamp(max=config.m_input_tokens).int()
    pooled, weights = attention_pool(
        windows,
        *memory.pooling.projections(),
        n_memory=n_slots,
        valid_memory=valid_memory,
        valid_tokens=valid_tokens,
        normalise=config.pooling_norm,
    )
    everyone = len(writers) == state.batch_size
    conv, ssm = state.conv, state.ssm
    if not everyone:
        conv, ssm = (tuple(tensor[rows] for tensor in tensors) for tensors in (conv, ssm))
    slots, conv, ssm = memory.ssm(pooled[:, None], torch.stack(conv), torch.stack(ssm), memory.ssm.prepare())
    for old, new in zip((*state.conv, *state.ssm), (*conv, *ssm), strict=True):
        if everyone:
            old.copy_(new)
        else:
            old.index_copy_(0, rows, new.to(old.dtype))
    if config.n_state_slots:
        index = torch.tensor([write % config.n_state_slots for write in writes], device=rows.device)
        state.slots[rows, index] = slots[:, 0].to(state.slots.dtype)
    if config.encoding == "stream" and config.n_ssm_outputs:
        keep_slots(decoder, slots[:, 0], state, writers, writes)
    return weights
