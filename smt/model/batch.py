"""Which rows of a batch run together: rows of any lengths, at any steps, each as if it were alone.

A row that takes one token, whatever its step, joins one decoding step (``smt.model.step``). Rows that take more run in parallel
over their tokens (``smt.model.parallel``), together with those that start at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from smt.model.decoder import Decoder
from smt.model.memory import StrideMemory
from smt.model.parallel import Encoded, encode_chunk
from smt.model.step import decode_step
from smt.model.step_layers import with_keys
from smt.runtime.device import from_host
from smt.state.state import SMTState
from smt_kernels.checks import readable
from smt_kernels.linear_cross_entropy import IGNORE_INDEX
from smt_kernels.operators import is_transformed


def check_rows(input_ids: Tensor) -> None:
    """Raise unless ``input_ids`` are integers (B, T).

    Raises:
        TypeError: not a tensor of integers.
        ValueError: wrong rank, or an empty batch.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be an int64 or int32 tensor, got {got}")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must have shape (B, T) with B, T >= 1, got {tuple(input_ids.shape)}")


def check_tokens(input_ids: Tensor, vocab_size: int, device: torch.device) -> None:
    """Raise unless ``input_ids`` are tokens (B, T) of the vocabulary of a model on ``device``.

    Raises:
        TypeError: as ``check_rows``.
        ValueError: as ``check_rows``; another device, or, on CPU, a token out of range.
    """
    check_rows(input_ids)
    if input_ids.device != device:
        raise ValueError(f"input_ids must be on the model's device {device}, got {input_ids.device}")
    # On a GPU reading the range would wait for the device; the embedding's own assertion stands guard there.
    if readable(input_ids) and not is_transformed():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids must lie in 0..vocab_size - 1 = 0..{vocab_size - 1}, got {low}..{high}")


def check_targets(name: str, targets: Tensor, input_ids: Tensor, vocab_size: int) -> None:
    """Raise unless ``targets``, called ``name``, are of the shape of ``input_ids``, and tokens of the vocabulary or -100.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: another shape, or, on CPU, a target out of range.
    """
    if not isinstance(targets, Tensor) or targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")
    if targets.shape != input_ids.shape:
        raise ValueError(f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(targets.shape)}")
    if readable(targets) and not is_transformed():  # on a GPU the loss of a target out of range is not a number
        wrong = targets[(targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))]
        if len(wrong):
            expected = f"0..vocab_size - 1 = 0..{vocab_size - 1} or be {IGNORE_INDEX}"
            raise ValueError(f"{name} must lie in {expected}, got {int(wrong[0])}")


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
    memory: StrideMemory,
    decoder: Decoder,
    embedded: Tensor,
    state: SMTState,
    counts: Sequence[int],
    *,
    decodes: bool,
    return_weights: bool,
    overwrite_state: bool,
    firsts: Sequence[int] | None = None,
) -> Encoded:
    """Encode the last counts[r] >= 0 embedded tokens of each row, (B, T, d), on top of ``state``; hidden is zero elsewhere.

    With ``firsts`` the embedded tokens are (1, T, d), all of some row: those of row r from firsts[r] on. Rows then run together
    only with rows of less than twice their length, so that more than half of what is computed is tokens.

    Args:
        decodes: whether one token of a row may be a decoding step, which has no gradient and no dropout.
        return_weights: also return the pooling weights of each write.
        overwrite_state: the new state may take the tensors of ``state``.
        firsts: of packed rows, where each begins; None: rows are padded on the left.
    """
    batch, length, width = len(counts), *embedded.shape[1:]
    if not decodes and decoder.config.encoding != "stream":
        state = state.without_keys()  # nothing here reads or forms them
    parts: dict[tuple[int | None, int], list[int]] = {}
    for row, (step, count) in enumerate(zip(state.steps, counts, strict=True)):
        if count:
            octave = 0 if firsts is None else count.bit_length()
            parts.setdefault((None if decodes and count == 1 and step > 0 else step, octave), []).append(row)

    def encode(step: int | None, embedded: Tensor, state: SMTState, counts: Sequence[int]) -> Encoded:
        if step is None:
            return decode_step(memory, decoder, embedded, state, return_weights=return_weights)
        return encode_chunk(memory, decoder, embedded, state, counts, keep_keys=decodes, return_weights=return_weights)

    flat = embedded.flatten(0, 1)
    if len(parts) == 1 and batch * min(counts) == len(flat):  # one behind the other, all of one length
        (((step, _), _),) = parts.items()
        if step is None and not overwrite_state:
            state = state.clone()
        encoded = encode(step, flat.unflatten(0, (batch, -1)), state, counts)
        return replace(encoded, hidden=encoded.hidden.reshape(embedded.shape))

    if decodes and not state.has_keys:
        state = with_keys(decoder, state)
    if firsts is None:
        firsts = [(row + 1) * length - count for row, count in enumerate(counts)]
    results, places = [], []
    for (step, _), rows in parts.items():
        counts_here = [counts[row] for row in rows]
        offset = torch.arange(max(counts_here), device=embedded.device)
        inside = offset < from_host(counts_here, embedded.device)[:, None]
        place = offset + from_host([firsts[row] for row in rows], embedded.device)[:, None]
        here = flat.index_select(0, place.clamp(max=len(flat) - 1).flatten()).unflatten(0, place.shape)
        here = here.masked_fill(~inside[..., None], 0)  # zeros behind a row's end
        part = encode(step, here, state.rows(rows), counts_here)
        results.append((rows, part))
        places.append(place.masked_fill(~inside, len(flat)).flatten())
    if not overwrite_state:
        state = state.clone()
    for rows, part in results:
        state = state.overwrite_rows(rows, part.state)
    hidden = torch.cat([part.hidden.flatten(0, 1) for _, part in results]) if results else flat[:0]
    total = hidden.new_zeros(len(flat) + 1, width)  # the last is for padding
    if results:
        total = total.index_copy(0, torch.cat(places), hidden)
    return Encoded(
        total[:-1].view(embedded.shape),
        state,
        _scatter_weights(results, batch, decoder.config.window_size, state.tokens) if return_weights else None,
    )


def _scatter_weights(results: list[tuple[list[int], Encoded]], batch: int, window: int, like: Tensor) -> Tensor:
    """Those of all rows, (B, K, W), zeros behind the writes of a row and where no part has it."""
    most = max((part.weights.shape[1] for _, part in results), default=0)
    total = like.new_zeros(batch, most, window, dtype=results[0][1].weights.dtype if results else like.dtype)
    for rows, part in results:
        padded = F.pad(part.weights, (0, 0, 0, most - part.weights.shape[1]))
        total = total.index_copy(0, from_host(rows, like.device), padded)
    return total
