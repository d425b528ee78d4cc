"""Associative recall by distance: how often a model names the value of a key that it was shown so many words ago.

The documents are those of ``smt.data.recall``, held out from its training documents. An answer counts when every token of it is
the likeliest of the whole vocabulary; a model without a memory of the pair can only guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smt.data.recall import RecallDocument, RecallTask
from smt.data.tokenizer import Tokenizer
from smt.evaluation.scorer import Scorer

# Training and held-out documents of the source have other numbers.
FIRST_DOCUMENT = 10**9


@dataclass(frozen=True)
class RecallAtDistance:
    """Answers at one distance.

    Attributes:
        distance: words from the value that was shown to the one that is due.
        accuracy: share of the answers that are right.
        nats: mean of -ln p(answer).
        n_questions: how many were asked.
    """

    distance: int
    accuracy: float
    nats: float
    n_questions: int


@dataclass(frozen=True)
class Recall:
    """Recall by distance.

    Attributes:
        chance: accuracy of one who knows which words are values, and no more.
        distances: one after another.
    """

    chance: float
    distances: tuple[RecallAtDistance, ...]


def usual_distances(window_size: int) -> tuple[int, ...]:
    """A quarter and half of the window's length, and then 1, 2, 3, 4, 5, 6 and 8 times its length."""
    within = {max(2, window_size // part) for part in (4, 2)}
    return tuple(sorted(within | {factor * window_size for factor in (1, 2, 3, 4, 5, 6, 8)}))


def recall(
    scorer: Scorer, tokenizer: Tokenizer, task: RecallTask, distances: Sequence[int], *, n_documents: int = 32
) -> Recall:
    """Ask for every pair of ``n_documents`` documents at each of the distances, others at each.

    Raises:
        ValueError: ``n_documents`` below 1.
    """
    if n_documents < 1:
        raise ValueError(f"n_documents must be at least 1, got {n_documents}")
    results = []
    for number, distance in enumerate(distances):
        there, first = task.at_distance(distance), FIRST_DOCUMENT + number * n_documents
        documents = [there.document(first + index) for index in range(n_documents)]
        encoded = [encode_words(document.words, tokenizer) for document in documents]
        scores = scorer.score([tokens for tokens, _ in encoded])
        right, nats = [], []
        for document, (_, starts), score in zip(documents, encoded, scores, strict=True):
            for span in _answers(document, starts):
                right.append(bool(score.greedy[span].all()))
                nats.append(-score.log_probs[span].sum().item())
        results.append(RecallAtDistance(distance, sum(right) / len(right), sum(nats) / len(nats), len(right)))
    return Recall(1 / task.values, tuple(results))


def encode_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[Tensor, list[int]]:
    """The tokens (L,) of an end of document and of each word with a space before it, and where each word starts; last, L."""
    of_word = {word: tokenizer.encode(f" {word}") for word in set(words)}
    pieces = [torch.tensor([tokenizer.end_of_document], device="cpu"), *(of_word[word] for word in words)]
    return torch.cat(pieces), torch.tensor([len(piece) for piece in pieces], device="cpu").cumsum(0).tolist()


def _answers(document: RecallDocument, starts: Sequence[int]) -> list[slice]:
    """The scores of each answer: that of token t stands at t - 1."""
    return [slice(starts[q.position] - 1, starts[q.position + 1] - 1) for q in document.questions]
