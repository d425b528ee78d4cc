"""Texts packed into rows, in the terms of ``DataCollatorWithFlattening``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smt.model.packed import text_bounds

# What the collator says of the same texts besides, for attention kernels and Mamba's: it is not read.
_SAME_TEXTS = ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def pop_text_bounds(options: dict[str, Any], input_ids: Tensor) -> tuple[int, ...] | None:
    """Take out of ``options`` what tells packed texts, and return where each of N begins, and the end of the last.

    Rows of ``input_ids`` (B, T) count as one behind the other. Reads the device.

    Args:
        options: ``position_ids``, (B, T) integers, 0 at the first token of a text; or ``cu_seq_lens_q``, (N + 1,); or both.

    Returns:
        N + 1 numbers; None: there is neither.

    Raises:
        TypeError: ``cu_seq_lens_q`` that are no integers.
        ValueError: positions of another shape, or that do not count 0, 1, 2 in every text; ``cu_seq_lens_q`` that do not rise
            from 0 to B T, or let a text go on in the next row; or the two differ.
    """
    positions, bounds = options.pop("position_ids", None), options.pop("cu_seq_lens_q", None)
    if positions is None and bounds is None:
        return None
    for name in _SAME_TEXTS:
        options.pop(name, None)
    if bounds is not None:
        bounds = text_bounds(bounds, input_ids.reshape(1, -1), name="cu_seq_lens_q")
        missing = sorted(set(range(0, input_ids.numel(), input_ids.shape[1])) - set(bounds))
        if missing:
            raise ValueError(f"cu_seq_lens_q must have {missing[0]}, where a row begins: texts end with it, got {bounds}")
    if positions is None:
        return bounds
    if positions.shape != input_ids.shape:
        shapes = tuple(input_ids.shape), tuple(positions.shape)
        raise ValueError(f"position_ids must have the shape of input_ids, {shapes[0]}, got {shapes[1]}")
    flat = positions.flatten().cpu()
    step = torch.arange(len(flat), device="cpu")
    begins = (flat == 0) | (step % input_ids.shape[1] == 0)  # no text goes on in the next row
    wrong = (flat != step - step.where(begins, 0).cummax(0).values).nonzero()
    if len(wrong):
        got = f"{int(flat[wrong[0]])} at token {int(wrong[0])}"
        raise ValueError(f"position_ids must count 0, 1, 2, ... in every text, and in every row anew, got {got}")
    found = *step[begins].tolist(), len(flat)
    if bounds is not None and bounds != found:
        raise ValueError(f"cu_seq_lens_q must be where position_ids are 0, and their end, {found}, got {bounds}")
    return found
