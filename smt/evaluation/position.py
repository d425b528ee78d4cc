"""Loss by position in the document: does it keep falling where only the memory reaches?

Positions count the tokens before the one that is predicted. Tokens up to m stand in the window themselves; those up to n S + m
have been pooled into a slot of the window; whatever lies further back can only be known through the SSM's state.

A bin's mean is over its tokens, and its interval over documents (``smt.evaluation.statistics``): tokens of one document are
no independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from smt.evaluation.scorer import TokenScores
from smt.evaluation.statistics import mean_of, mean_per_count


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
    counts = [len(piece) for piece in pieces]
    found = mean_per_count([piece.sum().item() for piece in pieces], counts)
    return Mean(found.mean, found.margin, sum(counts), len(pieces))


def fall_between(scores: Sequence[TokenScores], near: tuple[int, int], far: tuple[int, int]) -> Mean | None:
    """How much lower the loss is at the positions [far) than at [near), in the same documents: those that reach the end of far.

    Longer documents may be easier or harder; in the difference within a document that does not count.
    """
    reaching = [-score.log_probs for score in scores if len(score.log_probs) + 1 >= far[1]]
    if not reaching:
        return None
    falls = [(loss[near[0] - 1 : near[1] - 1].mean() - loss[far[0] - 1 : far[1] - 1].mean()).item() for loss in reaching]
    found = mean_of(falls)
    n_tokens = len(reaching) * (near[1] - near[0] + far[1] - far[0])
    return Mean(found.mean, found.margin, n_tokens, len(reaching))


def log_spaced(first: int, last: int, per_octave: int) -> tuple[int, ...]:
    """Distinct integers from ``first`` to ``last``, ``per_octave`` of them on each doubling."""
    count = math.ceil(per_octave * math.log2(last / first))
    return tuple(sorted({*(round(first * 2 ** (index / per_octave)) for index in range(count)), last}))
