"""Loss, perplexity and bits per byte and per character over whole documents, memory carried through each of them.

    loss = nats / targets,   perplexity = e^loss,   bits per byte = nats / (ln 2 * bytes of UTF-8 text)

Bits per byte, and per character, compare models whatever their tokens. The nats include the end of each document, the bytes and
characters do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smt.data.walk import Batch
from smt.evaluation.preference import PairEvaluation
from smt.model.evaluating import evaluating
from smt.runtime.device import sent
from smt.state.carried import CarriedStates

Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Totals over a set of documents.

    Attributes:
        nats: the sum of -ln p(target).
        n_targets: how many tokens were predicted.
        n_bytes: how many bytes of text they spell.
        n_characters: how many characters; None: not counted.
        pairs: of a model that is trained on them, how it tells held-out pairs apart.
    """

    nats: float
    n_targets: int
    n_bytes: int
    n_characters: int | None = None
    pairs: PairEvaluation | None = None

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

    @property
    def criterion(self) -> float:
        """The held-out loss of what is trained, by which the best weights are chosen."""
        return self.loss if self.pairs is None else self.pairs.loss

    @property
    def of_pairs(self) -> dict[str, float]:
        """The figures of held-out pairs, by the names under which a run records them; none where there are none."""
        if self.pairs is None:
            return {}
        of = self.pairs
        return {"pair_loss": of.loss, "reward_accuracy": of.accuracy, "log_odds_margin": of.margin}


@torch.no_grad()
def evaluate(objective: nn.Module, batches: Iterable[Batch], n_bytes: int, *, total: Sum = lambda sums: sums) -> Evaluation:
    """Run a model over ``batches`` without dropout, carrying its state through each document.

    Args:
        objective: gives loss and state of a chunk: ``smt.training.objective.ChunkLoss``, or what wraps it.
        n_bytes: how many bytes of text all of the batches spell.
        total: adds up a tensor over the processes that read the documents together.

    Raises:
        ValueError: nothing to predict.
    """
    device = next(objective.parameters()).device
    states = CarriedStates()
    losses: list[Tensor] = []
    counts: list[int] = []
    with evaluating(objective):
        for batch in batches:
            reading, state = states.continued(batch)
            loss, state = objective(sent(reading.input_ids, device), sent(reading.targets, device), state)
            states.keep(batch, state)
            losses.append(loss)
            counts.append(reading.n_targets)
    # Read only now: a device computes the next batch while this one prepares it.
    means = torch.stack(losses).tolist() if losses else []
    nats = sum(mean * count for mean, count in zip(means, counts, strict=True))
    nats, n_targets = total(torch.tensor([nats, sum(counts)], dtype=torch.float64, device="cpu")).tolist()
    if not n_targets or not n_bytes:
        raise ValueError(f"an evaluation needs text, got {int(n_targets)} targets and {n_bytes} bytes")
    return Evaluation(nats, int(n_targets), n_bytes)
