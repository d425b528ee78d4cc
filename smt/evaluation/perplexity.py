"""Loss, perplexity and bits per byte and per character over whole documents, memory carried through each of them.

    loss = nats / targets,   perplexity = e^loss,   bits per byte = nats / (ln 2 * bytes of UTF-8 text)

Bits per byte, and per character, compare models whatever their tokens. The nats include the end of each document, the bytes and
characters do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from smt.data.walk import Batch
from smt.model import StrideMemoryTransformer
from smt.precision import precision
from smt.state import SMTState


@dataclass(frozen=True)
class Evaluation:
    """Totals over a set of documents.

    Attributes:
        nats: the sum of -ln p(target).
        n_targets: how many tokens were predicted.
        n_bytes: how many bytes of text they spell.
        n_characters: how many characters; None: not counted.
    """

    nats: float
    n_targets: int
    n_bytes: int
    n_characters: int | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.n_targets

    @property
    def perplexity(self) -> float:
        """e^loss, infinite past the largest float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode a byte of text."""
        return self.nats / (math.log(2) * self.n_bytes)

    @property
    def bits_per_character(self) -> float | None:
        """Bits to encode a character; None where characters were not counted."""
        return None if self.n_characters is None else self.nats / (math.log(2) * self.n_characters)


class CarriedStates:
    """The state of each lane, for a model whose rows are all at the same step: rows that wait are left out of its batches."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[SMTState, torch.Tensor]] = {}

    def continued(self, batch: Batch) -> tuple[Batch, SMTState | None]:
        """The rows of ``batch`` that read, and the state that they continue; None where they begin.

        Raises:
            ValueError: some rows begin a document and others do not.
        """
        rows = batch.reading.nonzero()[:, 0]
        begun = batch.reset[rows]
        if begun.any() and not begun.all():
            raise ValueError("the rows of a batch must begin their documents together; walk with together=True")
        if begun.all():
            return batch.rows(rows), None
        state, before = self._of[batch.lane]
        return batch.rows(rows), state if len(rows) == len(before) else state.rows(torch.isin(before, rows).nonzero()[:, 0])

    def keep(self, batch: Batch, state: SMTState) -> None:
        """Remember the state after the rows of ``batch`` that read."""
        self._of[batch.lane] = state, batch.reading.nonzero()[:, 0]


@torch.no_grad()
def evaluate(model: StrideMemoryTransformer, batches: Iterable[Batch], n_bytes: int) -> Evaluation:
    """Run ``model`` over ``batches`` without dropout, carrying its state through each document.

    Raises:
        ValueError: nothing to predict.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    states = CarriedStates()
    nats, total = 0.0, 0
    try:
        for batch in batches:
            reading, state = states.continued(batch)
            with precision(device):
                loss, aux = model.loss(reading.input_ids.to(device), reading.targets.to(device), state)
            states.keep(batch, aux.state)
            n_targets = reading.n_targets
            nats += float(loss) * n_targets
            total += n_targets
    finally:
        model.train(was_training)
    if not total or not n_bytes:
        raise ValueError(f"an evaluation needs text, got {total} targets and {n_bytes} bytes")
    return Evaluation(nats, total, n_bytes)
