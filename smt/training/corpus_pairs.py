"""Preference pairs out of a corpus: how a document really goes on, against what a model makes of its beginning."""

from __future__ import annotations

import random
from bisect import bisect_right
from itertools import accumulate

import torch
from torch import nn

from smt.data.pairs import Pair
from smt.data.store import TokenStore


def corpus_pairs(
    model: nn.Module,
    documents: TokenStore,
    n_pairs: int,
    *,
    prompt_length: int,
    completion_length: int,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 16,
) -> list[Pair]:
    """Draw pieces of documents, and let the model continue their beginnings.

    Pieces are drawn without repetition, each place of each document with the same chance; they may overlap. The model's
    continuation has the length of the true one, whatever tokens are in it.

    Args:
        model: with ``generate``; its mode is left as it is.
        documents: ``train`` of a tokenized corpus, unless the pairs are held out.
        n_pairs: how many at most; a continuation that is the true one gives no pair.
        prompt_length: tokens of the prompt, which is all that the model sees of the document.
        completion_length: tokens of each completion.
        seed: of places and continuations.
        temperature: of the continuations.
        batch_size: prompts that are continued together.

    Returns:
        the true continuation as chosen, the model's as rejected, for ``write_pairs``.

    Raises:
        ValueError: a length below 1, or the documents have fewer chunks of this length.
    """
    for name, value in (("prompt_length", prompt_length), ("completion_length", completion_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    n_tokens = prompt_length + completion_length
    ends = list(accumulate(max(0, length - n_tokens + 1) for length in documents.lengths))
    n_pieces = ends[-1] if ends else 0
    if n_pieces == 0:
        raise ValueError(f"prompt_length + completion_length = {n_tokens} is more than any document has tokens")
    if not 1 <= n_pairs <= n_pieces:
        raise ValueError(f"n_pairs must lie in 1..{n_pieces}, the pieces of {n_tokens} tokens that there are, got {n_pairs}")
    pieces = []
    for place in random.Random(seed).sample(range(n_pieces), n_pairs):
        document = bisect_right(ends, place)
        start = place - (ends[document - 1] if document else 0)
        pieces.append(torch.from_numpy(documents[document][start : start + n_tokens].astype("int64")))
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    pairs = []
    for some in torch.stack(pieces).split(batch_size):
        options = {"temperature": temperature, "generator": generator}
        drawn = model.generate(some[:, :prompt_length].to(device), completion_length, **options)[:, prompt_length:]
        for piece, rejected in zip(some.tolist(), drawn.tolist(), strict=True):
            prompt, chosen = piece[:prompt_length], piece[prompt_length:]
            if chosen != rejected:
                pairs.append(Pair(prompt, chosen, rejected))
    return pairs
