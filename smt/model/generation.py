"""Continuing prompts: one parallel pass over them, then one decoding step per token, each row until its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from smt.model.batch import check_rows, token_counts


class Carried(Protocol):
    """What the rows of a batch carry from one call of a model to the next."""

    def rows(self, rows: Tensor) -> Any:
        """That of some of them."""


# Tokens (B, T), what their rows carry (None: nothing yet) and their mask -> logits (B, V) of what follows, and what they carry.
NextLogits = Callable[[Tensor, Any, Tensor | None], tuple[Tensor, Carried]]

# Far below it, logits that are divided by the temperature leave the range of fp32.
LEAST_TEMPERATURE = 1e-6


def generate(next_logits: NextLogits, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    """Continue ``input_ids`` (B, T): the prompts and what ``stream`` yields behind them; arguments and errors as there.

    Returns:
        (B, T + new) int64, where new is max_new_tokens, or less when all rows have ended before.
    """
    new = [tokens[:, None] for tokens in stream(next_logits, input_ids, max_new_tokens, **options)]
    return torch.cat([input_ids.long(), *new], dim=1)


def stream(
    next_logits: NextLogits,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    vocab_size: int,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The next token of every row, again and again, as soon as it is drawn.

    A row that has ended is not computed any more, so the others go faster. Memory is constant however long this runs.

    Args:
        next_logits: one call of a model.
        input_ids: (B, T) integer tokens of the prompts.
        max_new_tokens: tokens per row at most.
        vocab_size: how many tokens the model knows.
        attention_mask: (B, T), 0 at padding on the left of shorter prompts; every row has a token. None: no padding.
        temperature: divides the logits; 0 takes the most likely token. Others are at least ``LEAST_TEMPERATURE``.
        top_k: keep only the k most likely tokens.
        top_p: keep only the most likely tokens whose probabilities first sum to at least p.
        eos_token_id: token or tokens that end their row; None: none does.
        pad_token_id: stands in rows behind their end; None: the first of ``eos_token_id``.
        generator: source of randomness.

    Yields:
        (B,) int64 tokens, at most ``max_new_tokens`` times, until all rows have ended.

    Raises:
        TypeError: prompts that are no tensor of integers, or as ``next_logits`` does.
        ValueError: an option out of range, prompts of another rank, a row without tokens, or as ``next_logits`` does.
    """
    check_rows(input_ids)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    _check_tokens(vocab_size, ends, pad_token_id)
    if attention_mask is not None:
        empty = [row for row, count in enumerate(token_counts(attention_mask, input_ids)) if count == 0]
        if empty:
            raise ValueError(f"every row of attention_mask must have a token, rows {empty} have none")
    return _stream(
        next_logits, input_ids, max_new_tokens, attention_mask, (temperature, top_k, top_p, generator), ends, pad_token_id
    )


@torch.no_grad()
def _stream(
    next_logits: NextLogits,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None,
    sampling: tuple[float, int | None, float | None, torch.Generator | None],
    ends: list[int],
    pad_token_id: int | None,
) -> Iterator[Tensor]:
    device, batch = input_ids.device, input_ids.shape[0]
    stops = torch.tensor(ends, dtype=torch.int64, device=device)
    padding = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
    running = torch.arange(batch, device=device)  # rows that have not ended
    piece, state = input_ids, None
    for _ in range(max_new_tokens):
        logits, state = next_logits(piece, state, attention_mask)
        attention_mask = None
        piece = sample(logits, *sampling)
        tokens = piece[:, 0].clone()
        if len(running) < batch:
            tokens = tokens.new_full((batch,), padding).index_copy_(0, running, tokens)
        yield tokens
        if ends:
            going = ~torch.isin(piece[:, 0], stops)
            kept = going.nonzero().flatten()
            if len(kept) == 0:
                return
            if len(kept) < len(running):
                running, piece, state = running[kept], piece[kept], state.rows(kept)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token per row, (B, 1) int64, from logits (B, V); what is no number is refused on a CPU, where looking costs no wait.

    Of independent exponential waiting times with rates p, the one of token i is the shortest with probability p_i: nothing is
    read back from the device, as ``torch.multinomial`` does to check its input.
    """
    if logits.device.type == "cpu" and logits.isnan().any():
        raise ValueError("logits must be numbers, the model gives nan")
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
    waiting = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=torch.finfo(logits.dtype).tiny)
    return (logits.softmax(dim=-1) / waiting).argmax(dim=-1, keepdim=True)


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError if an option of ``stream`` is out of range."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature must be 0, or finite and at least {LEAST_TEMPERATURE}, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def _check_tokens(vocab_size: int, ends: list[int], pad_token_id: int | None) -> None:
    for name, tokens in (("eos_token_id", ends), ("pad_token_id", [] if pad_token_id is None else [pad_token_id])):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{name} must lie in 0..vocab_size - 1 = 0..{vocab_size - 1}, got {token}")
