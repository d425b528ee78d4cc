"""Sampling tokens one at a time from a model with carried state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from smt.model import StrideMemoryTransformer


@torch.no_grad()
def generate(
    model: StrideMemoryTransformer,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue ``input_ids`` (B, T) int64 by ``max_new_tokens``: one parallel pass over the prompt, then one step per token.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep only the k most likely tokens.
        top_p: keep only the most likely tokens whose probabilities first sum to at least p.
        generator: source of randomness.

    Returns:
        (B, T + max_new_tokens) int64.

    Raises:
        ValueError: an option out of range.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    was_training = model.training
    model.eval()
    try:
        output, state, piece = input_ids, None, input_ids
        for _ in range(max_new_tokens):
            logits, aux = model(piece, state=state, last_only=True)
            state = aux.state
            piece = sample(logits[:, -1], temperature, top_k, top_p, generator)
            output = torch.cat([output, piece], dim=1)
        return output
    finally:
        model.train(was_training)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token per row, (B, 1) int64, from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability  # mass of the more likely tokens
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, before >= top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
