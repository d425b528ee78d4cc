"""Documents in lockstep: a batch of documents is walked chunk by chunk, so that memory runs through each from its first token.

All rows of a batch start together and so are always at the same step. A row leaves its batch when its document ends; only
the last chunk of a document is padded. Several batches (*lanes*) take turns, so that consecutive optimiser steps see
different documents although each is read to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smt.loss import IGNORE_INDEX

# A batch is drawn from this many batches' worth of documents of similar length: enough to mix, similar enough to stay full.
BUCKET_BATCHES = 8


@dataclass(frozen=True)
class Chunk:
    """The next steps of a batch of documents.

    Attributes:
        lane: which of the batches that take turns.
        first: these are the documents' first steps: there is no state yet.
        rows: (B,) int64, the rows of this lane's chunk before whose documents go on here; None: all of them.
        input_ids: (B, T) int64.
        targets: (B, T) int64, the token that follows each step, -100 where a document has ended.
    """

    lane: int
    first: bool
    rows: Tensor | None
    input_ids: Tensor
    targets: Tensor

    @property
    def n_targets(self) -> int:
        """Steps that are not padding."""
        return int((self.targets != IGNORE_INDEX).sum())


def walk(documents: list[Tensor], length: int, lane: int = 0) -> Iterator[Chunk]:
    """One batch of documents, (L,) int64 each with L >= 2, from its first step to its last, ``length`` steps at a time.

    Every token but a document's first is a target exactly once: the last step of a chunk predicts the first of the next.
    """
    n_steps = torch.tensor([len(document) - 1 for document in documents])
    active = torch.arange(len(documents))
    for start in range(0, int(n_steps.max()), length):
        going_on = n_steps[active] > start
        rows = None if bool(going_on.all()) else going_on.nonzero()[:, 0]
        active = active[going_on]
        size = min(length, int(n_steps[active].max()) - start)
        input_ids = torch.zeros(len(active), size, dtype=torch.int64)
        targets = torch.full_like(input_ids, IGNORE_INDEX)
        for row, index in enumerate(active.tolist()):
            piece = documents[index][start : start + size + 1]
            input_ids[row, : len(piece) - 1] = piece[:-1]
            targets[row, : len(piece) - 1] = piece[1:]
        yield Chunk(lane, start == 0, rows, input_ids, targets)


def draw_batches(documents: list[Tensor], batch_size: int, generator: torch.Generator) -> list[list[Tensor]]:
    """All documents in batches of similar length, the batches in random order."""
    by_length = sorted(range(len(documents)), key=lambda index: len(documents[index]))
    bucket_size = BUCKET_BATCHES * batch_size
    batches = []
    for start in range(0, len(by_length), bucket_size):
        bucket = by_length[start : start + bucket_size]
        mixed = [bucket[index] for index in torch.randperm(len(bucket), generator=generator).tolist()]
        batches += [mixed[first : first + batch_size] for first in range(0, len(mixed), batch_size)]
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [[documents[index] for index in batches[drawn]] for drawn in order]


def training_chunks(documents: list[Tensor], *, batch_size: int, length: int, lanes: int, seed: int) -> Iterator[Chunk]:
    """Chunks without end: ``lanes`` batches take turns, and a batch that ends is replaced by the next of its epoch.

    Each epoch reads every document once, in an order that ``seed`` fixes.
    """
    generator = torch.Generator().manual_seed(seed)

    def epochs() -> Iterator[list[Tensor]]:
        while True:
            yield from draw_batches(documents, batch_size, generator)

    batches = epochs()
    walks = [walk(next(batches), length, lane) for lane in range(lanes)]
    while True:
        for lane in range(lanes):
            chunk = next(walks[lane], None)
            if chunk is None:
                walks[lane] = walk(next(batches), length, lane)
                chunk = next(walks[lane])
            yield chunk


def evaluation_chunks(documents: list[Tensor], *, batch_size: int, length: int) -> Iterator[Chunk]:
    """Every document once, the longest first, in batches of similar length."""
    by_length = sorted(documents, key=len, reverse=True)
    for start in range(0, len(by_length), batch_size):
        yield from walk(by_length[start : start + batch_size], length)
