"""Loss by position in the document: does it keep falling where only the memory reaches?

Positions count the tokens before the one that is predicted. Tokens up to m stand in the window themselves; those up to n S + m
have been pooled into a slot of the window; whatever lies further back can only be known through the SSM's state.

A bin's mean is over its tokens, and its interval over documents: tokens of one document are no independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from smt.evaluation.scorer import TokenScores

# Half the width of an interval that holds the mean with 95 %, in standard errors of a normal distribution.
Z_95 = 1.96


@dataclass(frozen=True)
class Mean:
    """A mean loss with its interval.

    Attributes:
        nats: per token.
        margin: half the width of the 95 % interval over documents; None with fewer than two of them.
        n_tokens, n_documents: that it is taken over.
    """

    nats: float
    margin: float | None
    n_tokens: int
    n_documents: int


@dataclass(frozen=True)
class LossByPosition:
    """Losses by position.

    Attributes:
        edges: B + 1 positions; bin b holds the positions edges[b] <= position < edges[b + 1].
        bins: of each of the B bins, its mean; None where no document is so long.
    """

    edges: tuple[int, ...]
    bins: tuple[Mean | None, ...]


def loss_by_position(scores: Sequence[TokenScores], *, bins_per_octave: int = 2) -> LossByPosition:
    """Mean losses in bins whose width grows with the position.

    Raises:
        ValueError: no document.
    """
    if not scores:
        raise ValueError("loss by position needs a document, got none")
    edges = log_spaced(1, 1 + max(len(score.log_probs) for score in scores), bins_per_octave)
    return LossByPosition(edges, tuple(mean_between(scores, start, stop) for start, stop in pairwise(edges)))


def mean_between(scores: Sequence[TokenScores], start: int, stop: int | None = None) -> Mean | None:
    """The mean loss of the positions [start, stop), stop None: to the end; None where no document is so long."""
    pieces = [-score.log_probs[max(start, 1) - 1 : None if stop is None else stop - 1] for score in scores]
    pieces = [piece for piece in pieces if len(piece)]
    if not pieces:
        return None
    nats = torch.stack([piece.sum() for piece in pieces])
    counts = torch.tensor([len(piece) for piece in pieces], dtype=torch.float64, device="cpu")
    mean = (nats.sum() / counts.sum()).item()
    return Mean(mean, _margin(nats - mean * counts, counts), int(counts.sum()), len(pieces))


def fall_between(scores: Sequence[TokenScores], near: tuple[int, int], far: tuple[int, int]) -> Mean | None:
    """How much lower the loss is at the positions [far) than at [near), in the same documents: those that reach the end of far.

    Longer documents may be easier or harder; in the difference within a document that does not count.
    """
    reaching = [-score.log_probs for score in scores if len(score.log_probs) + 1 >= far[1]]
    if not reaching:
        return None
    falls = torch.stack([loss[near[0] - 1 : near[1] - 1].mean() - loss[far[0] - 1 : far[1] - 1].mean() for loss in reaching])
    mean = falls.mean().item()
    n_tokens = len(reaching) * (near[1] - near[0] + far[1] - far[0])
    return Mean(mean, _margin(falls - mean, torch.ones_like(falls)), n_tokens, len(reaching))


def log_spaced(first: int, last: int, per_octave: int) -> tuple[int, ...]:
    """Distinct integers from ``first`` to ``last``, ``per_octave`` of them on each doubling."""
    count = math.ceil(per_octave * math.log2(last / first))
    return tuple(sorted({*(round(first * 2 ** (index / per_octave)) for index in range(count)), last}))


def standard_error(residuals: Tensor, counts: Tensor) -> float | None:
    """Of a ratio of sums over documents, by the linearised variance; None with fewer than two of them."""
    n_documents = len(residuals)
    if n_documents < 2:
        return None
    variance = residuals.square().sum() / counts.sum() ** 2 * n_documents / (n_documents - 1)
    return variance.sqrt().item()


def _margin(residuals: Tensor, counts: Tensor) -> float | None:
    error = standard_error(residuals, counts)
    return None if error is None else Z_95 * error
