"""Which rows of a batch run together: rows of any lengths, at any steps, each as if it were alone.

A row that takes one token, whatever its step, joins one decoding step (``smt.model.step``). Rows that take more run in parallel
over their tokens (``smt.model.parallel``), together with those that start at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from smt.model.parallel import Encoded, encode_chunk
from smt.model.step import decode_step
from smt.state.rings import take
from smt.state.state import SMTState

if TYPE_CHECKING:
    from smt.model.transformer import StrideMemoryTransformer


def token_counts(attention_mask: Tensor, input_ids: Tensor) -> tuple[int, ...]:
    """How many tokens each row takes.

    Raises:
        TypeError: not a tensor of integers or bool.
        ValueError: not of the shape or on the device of input_ids, or a row is not zeros and then ones.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point() or attention_mask.is_complex():
        got = attention_mask.dtype if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise TypeError(f"attention_mask must be a tensor of integers or bool, got {got}")
    if attention_mask.shape != input_ids.shape:
        shapes = tuple(input_ids.shape), tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must have the shape of input_ids, {shapes[0]}, got {shapes[1]}")
    if attention_mask.device != input_ids.device:
        raise ValueError(f"attention_mask must be on the device of input_ids, {input_ids.device}, got {attention_mask.device}")
    length = attention_mask.shape[1]
    counts = attention_mask.sum(dim=1)
    left_padded = attention_mask == (torch.arange(length, device=counts.device) >= length - counts[:, None])
    counts, good = torch.stack([counts, left_padded.all(dim=1).long()]).tolist()  # the only read of the device
    for row, fits in enumerate(good):
        if not fits:
            raise ValueError(f"attention_mask must be 0 on the left and 1 on the right (left padding), row {row} is not")
    return tuple(counts)


def encode_batch(
    model: StrideMemoryTransformer,
    input_ids: Tensor,
    state: SMTState,
    counts: Sequence[int],
    *,
    return_weights: bool,
    overwrite_state: bool,
) -> Encoded:
    """Encode the last counts[r] >= 0 tokens of each row of input_ids (B, T) on top of ``state``; hidden is zero elsewhere."""
    batch, length = input_ids.shape
    # A decoding step has no gradient and no dropout.
    decodes = not torch.is_grad_enabled() and not model.training
    parts: dict[int | None, list[int]] = {}
    for row, (step, count) in enumerate(zip(state.steps, counts, strict=True)):
        if count:
            parts.setdefault(None if decodes and count == 1 and step > 0 else step, []).append(row)

    def encode(step: int | None, input_ids: Tensor, state: SMTState, counts: Sequence[int]) -> Encoded:
        if step is None:
            return decode_step(model, input_ids, state, return_weights=return_weights)
        return encode_chunk(model, input_ids, state, counts, return_weights=return_weights)

    if len(parts) == 1 and min(counts) == length:
        ((step, _),) = parts.items()
        if step is None and not overwrite_state:
            state = state.clone()
        return encode(step, input_ids, state, counts)

    results = []
    for step, rows in parts.items():
        counts_here = [counts[row] for row in rows]
        padding = torch.tensor([length - count for count in counts_here], device=input_ids.device)[:, None]
        position = torch.arange(length, device=input_ids.device)
        ids = take(input_ids[rows], position[: max(counts_here)] + padding)  # left-aligned; behind a row's end token 0
        part = encode(step, ids, state.rows(rows), counts_here)
        results.append((rows, Encoded(take(part.hidden, position - padding), part.state, part.weights)))
    if not overwrite_state:
        state = state.clone()
    for rows, part in results:
        state = state.overwrite_rows(rows, part.state)
    return Encoded(
        _scatter([(rows, part.hidden) for rows, part in results], batch, (length, model.config.d_model), state.tokens),
        state,
        _scatter_weights(results, batch, model.config.window_size, state.tokens) if return_weights else None,
    )


def _scatter(parts: list[tuple[list[int], Tensor]], batch: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """One tensor (B, *shape) of the rows of all parts, zeros where no part has a row."""
    dtype = parts[0][1].dtype if parts else like.dtype
    total = like.new_zeros(batch, *shape, dtype=dtype)
    for rows, values in parts:
        total = total.index_copy(0, torch.tensor(rows, device=like.device), values)
    return total


def _scatter_weights(results: list[tuple[list[int], Encoded]], batch: int, window: int, like: Tensor) -> Tensor:
    most = max((part.weights.shape[1] for _, part in results), default=0)
    padded = [(rows, F.pad(part.weights, (0, 0, 0, most - part.weights.shape[1]))) for rows, part in results]
    return _scatter(padded, batch, (most, window), like)
