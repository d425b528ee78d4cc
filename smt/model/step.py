"""One token per row, whatever the row's step: append it to the rings, encode it, and write where a row's step is a write step.

Cost and size of everything here are those of the window. The tensors of the state are changed in place.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from smt.model.decoder import Decoder
from smt.model.memory import StrideMemory
from smt.model.parallel import Encoded
from smt.model.readout import contribution
from smt.model.step_layers import decode_stream, decode_stride, decode_token, keep_slots, with_keys
from smt.runtime.device import from_host
from smt.runtime.precision import dtype_of_products
from smt.state.rings import from_ring
from smt.state.state import SMTState
from smt_kernels import attention_pool

_ENCODE = {"stream": decode_stream, "stride": decode_stride, "token": decode_token}


def decode_step(memory: StrideMemory, decoder: Decoder, embedded: Tensor, state: SMTState, *, return_weights: bool) -> Encoded:
    """Take one embedded token per row, (B, 1, d), on top of ``state``, whose tensors it overwrites; no row is at step 0.

    Where rows at one step all do the same, nothing is copied to the device: it counts their steps itself.
    """
    if not state.has_keys:
        state = with_keys(decoder, state)
    config, window, step, embedded = decoder.config, decoder.config.window, state.device_steps, embedded[:, 0]
    rows = torch.arange(len(step), device=step.device)
    state.tokens[rows, step % config.m_input_tokens] = embedded
    hidden = _ENCODE[config.encoding](decoder, embedded, state)
    if config.reads_out and config.writes:  # before the first write, zero is read and tells nothing
        newest = (window.writes_before(step) - 1) % config.n_state_slots
        hidden = hidden + contribution(decoder.slot_readout, state.slots[rows, newest].to(hidden.dtype))
    writers = [row for row, of_row in enumerate(state.steps) if config.writes and of_row > 0 and of_row % config.stride == 0]
    weights = None
    if return_weights:
        weights = hidden.new_zeros(len(step), 1 if writers else 0, config.window_size)
    if writers:
        writing = rows if len(writers) == len(rows) else from_host(writers, rows.device)
        of_writers = _write(memory, decoder, state, writing, min(state.steps[row] for row in writers))
        if return_weights:
            weights[writing, 0, config.window_size - of_writers.shape[1] :] = of_writers.to(weights.dtype)
    steps = tuple(of_row + 1 for of_row in state.steps)
    return Encoded(hidden[:, None], replace(state, steps=steps, device_steps=step + 1), weights)


def _write(memory: StrideMemory, decoder: Decoder, state: SMTState, rows: Tensor, earliest: int) -> Tensor:
    """Make the write of each of ``rows``, none before the step ``earliest``; returns its pooling weights (R, W), or (R, m)."""
    config, window = decoder.config, decoder.config.window
    everyone, step = len(rows) == state.batch_size, state.device_steps[rows]
    write = window.writes_made(step + 1) - 1
    _, slot_stop = window.pooled_slots(write, config.write_group)

    n_slots = config.n_ssm_outputs if config.pool_source == "window" else 0
    windows = from_ring(state.tokens, step + 1, config.m_input_tokens, rows=rows)
    if n_slots:
        windows = torch.cat([from_ring(state.slots, slot_stop, n_slots, rows=rows), windows], dim=1)
    valid_memory = valid_tokens = None
    if config.empty_slots == "mask":
        # The host knows whether all entries exist.
        least = window.pooled_slots(window.writes_made(earliest + 1) - 1, config.write_group)[1]
        valid_memory = slot_stop.clamp(max=n_slots).int() if least < n_slots else None
        valid_tokens = (step + 1).clamp(max=config.m_input_tokens).int() if earliest + 1 < config.m_input_tokens else None
    dtype = dtype_of_products(windows)
    pooled, weights = attention_pool(
        windows.to(dtype),
        *memory.pooling.projections(dtype),
        n_memory=n_slots,
        valid_memory=valid_memory,
        valid_tokens=valid_tokens,
        normalise=config.pooling_norm,
    )
    conv, ssm = (state.conv, state.ssm) if everyone else (state.conv[:, rows], state.ssm[:, rows])
    slots, conv, ssm = memory.ssm(pooled[:, None], conv, ssm, memory.ssm.prepare())
    for old, new in ((state.conv, conv), (state.ssm, ssm)):
        if everyone:
            old.copy_(new)
        else:
            old.index_copy_(1, rows, new.to(old.dtype))
    if config.n_state_slots:
        state.slots[rows, write % config.n_state_slots] = slots[:, 0].to(state.slots.dtype)
    if config.encoding == "stream" and config.n_ssm_outputs:
        keep_slots(decoder, slots[:, 0], state, rows, write)
    return weights
