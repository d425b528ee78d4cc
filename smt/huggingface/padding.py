"""Padding behind a row's tokens, as data collators put it: by causality the model may take it for tokens."""

from __future__ import annotations

from torch import Tensor


def right_padding_taken(attention_mask: Tensor) -> tuple[Tensor, bool]:
    """The mask (B, T) with ones also behind each row's tokens, and whether it had zeros there.

    Raises:
        ValueError: not of two dimensions, or a row whose tokens do not stand together.
    """
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must have shape (B, T), got {tuple(attention_mask.shape)}")
    mask = attention_mask.long()
    filled = mask.cummax(dim=1).values
    runs = (mask.diff(dim=1, prepend=mask.new_zeros(mask.shape[0], 1)) > 0).sum(dim=1)
    most, padded = max(runs.tolist()), bool((filled != mask).any())
    if most > 1:
        row = runs.tolist().index(most)
        raise ValueError(f"attention_mask must be 1 at tokens that stand together, row {row} has {most} stretches of ones")
    return filled, padded
