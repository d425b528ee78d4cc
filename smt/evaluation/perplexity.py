"""Loss, perplexity and bits per byte over whole documents, with the memory carried through each of them.

    loss = nats / targets,   perplexity = e^loss,   bits per byte = nats / (ln 2 * bytes of UTF-8 text)

Bits per byte compares models whatever their tokens. The nats include the end of each document, the bytes do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from smt.data.batches import Chunk
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
    """

    nats: float
    n_targets: int
    n_bytes: int

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


def carried_state(states: dict[int, SMTState], chunk: Chunk) -> SMTState | None:
    """The state that ``chunk`` continues, of the rows whose documents go on; None at the start of documents."""
    if chunk.first:
        return None
    state = states[chunk.lane]
    return state if chunk.rows is None else state.rows(chunk.rows)


@torch.no_grad()
def evaluate(model: StrideMemoryTransformer, chunks: Iterable[Chunk], n_bytes: int) -> Evaluation:
    """Run ``model`` over ``chunks`` without dropout, carrying its state through each document.

    Raises:
        ValueError: nothing to predict.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    states: dict[int, SMTState] = {}
    nats, total = 0.0, 0
    try:
        for chunk in chunks:
            state = carried_state(states, chunk)
            with precision(device):
                loss, aux = model.loss(chunk.input_ids.to(device), chunk.targets.to(device), state)
            states[chunk.lane] = aux.state
            n_targets = chunk.n_targets
            nats += float(loss) * n_targets
            total += n_targets
    finally:
        model.train(was_training)
    if not total or not n_bytes:
        raise ValueError(f"an evaluation needs text, got {total} targets and {n_bytes} bytes")
    return Evaluation(nats, total, n_bytes)
