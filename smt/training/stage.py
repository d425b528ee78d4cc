"""What a stage of training descends: batches of what, and how their losses are weighed; the loop around them is one.

An optimiser step descends a sum of terms over all batches and processes,

    weight * sum over its batches of sum_k factor_k value_k

The factors turn values, such as means over targets, into nats per target of the step, so that neither batches nor processes
stand in it; the weight divides by the targets of the step. A term of another unit, such as a mean over pairs, has a factor that
makes up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smt.data.pair_walk import PairBatch, PairWalk
from smt.data.pairs import Pair
from smt.data.parts import Parts
from smt.data.settings import DataConfig
from smt.data.walk import Batch, DocumentWalk
from smt.model.preference import odds_ratio_loss
from smt.runtime.device import sent
from smt.state.carried import CarriedStates
from smt.training.objective import ChunkLoss, PairLogProbabilities
from smt.training.shapes import full_shape

# Batches of pairs that are all of one width are as wide as the longest pair, in such steps, which suit the blocks of kernels.
WIDTH_STEP = 64
# A mean, or a sum, over a batch, and what makes nats of it.
Term = tuple[Tensor, float]


class Pretraining:
    """Documents, memory carried through each; a step descends

        (sum of nats / targets that the loss counts) * (steps that are read / steps of full batches)

    All targets weigh the same, wherever they are, and a step in which rows wait weighs less than a full one.

    Attributes:
        walk: gives batches, and can be saved and resumed.

    Args:
        documents: tokens of each, (L,) integers: a ``TokenStore``, arrays or tensors.
        counted: of each document, (L,) bool, which tokens the loss counts; None: all but the first.
        rank, world_size: which of how many processes this is.
    """

    def __init__(
        self,
        documents: Sequence[Any],
        data: DataConfig,
        *,
        seed: int,
        counted: Sequence[Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if data.part_length is not None:
            documents = Parts(documents, data.part_length)
            counted = None if counted is None else Parts(counted, data.part_length)
        self.walk = DocumentWalk(
            documents,
            counted=counted,
            batch_size=data.batch_size,
            length=data.chunk_length,
            lanes=data.lanes,
            seed=seed,
            together=True,
            rank=rank,
            world_size=world_size,
        )
        self._length, self._full_batch = data.chunk_length, data.batch_size * data.chunk_length

    def objective(self, model: nn.Module) -> nn.Module:
        """The module that distributed training wraps."""
        return ChunkLoss(model)

    def full_shape(self, batch: Batch) -> Batch:
        """The same batch in the shape of every other."""
        return full_shape(batch, self._length)

    def counts(self, batch: Batch) -> list[int]:
        """Targets that the loss counts, steps, and positions of the rows that read."""
        return [batch.n_targets, batch.n_steps, batch.targets[batch.reading].numel()]

    def weight(self, counts: Sequence[int]) -> float:
        """Of a nat, where ``counts`` are of the whole step; Accelerate then takes the mean over batches and processes."""
        n_targets, n_steps, _ = counts
        return n_steps / self._full_batch / max(1, n_targets)

    def terms(
        self, objective: nn.Module, batch: Batch, states: CarriedStates, counts: Sequence[int], device: torch.device
    ) -> list[Term]:
        """What a batch adds to the loss of a step of ``counts``; ``states`` are those of its rows, and go on."""
        reading, state = states.continued(batch)
        loss, state = objective(sent(reading.input_ids, device), sent(reading.targets, device), state)
        states.keep(batch, state)
        return [(loss, reading.n_targets)]


class Preference:
    """Pairs of completions (ORPO); a step descends

        (sum of nats of the chosen rows, prompts included, / their targets) + strength * mean odds ratio loss

    Both rows of a pair are in one forward pass, and begin with nothing in memory. Attributes and methods are those of
    ``Pretraining``.

    Args:
        pairs: one or more.
        data: a batch has ``batch_size`` pairs, of at most ``chunk_length`` steps.
        strength: lambda of the paper.
        rank, world_size: which of how many processes this is.

    Raises:
        ValueError: no pairs, or one that is too long.

    Source: Hong, Lee and Thorne, 2024, arXiv:2403.07691, equation 6.
    """

    def __init__(
        self, pairs: Sequence[Pair], data: DataConfig, *, seed: int, strength: float, rank: int = 0, world_size: int = 1
    ) -> None:
        longest = max((len(pair.prompt) + max(map(len, pair[1:])) - 1 for pair in pairs), default=0)
        if longest > data.chunk_length:
            raise ValueError(f"pairs must have at most chunk_length = {data.chunk_length} steps in a row, one has {longest}")
        self.walk = PairWalk(pairs, batch_size=data.batch_size, seed=seed, rank=rank, world_size=world_size)
        self._width, self._strength = min(data.chunk_length, -(-longest // WIDTH_STEP) * WIDTH_STEP), strength

    def objective(self, model: nn.Module) -> nn.Module:
        """The module that distributed training wraps."""
        return PairLogProbabilities(model)

    def full_shape(self, batch: PairBatch) -> PairBatch:
        """The same batch in the shape of every other."""
        return batch.widened(self._width)

    def counts(self, batch: PairBatch) -> list[int]:
        """Targets of the chosen rows, and steps, positions and pairs of all."""
        return [batch.n_targets, batch.n_steps, batch.targets.numel(), batch.n_pairs]

    def weight(self, counts: Sequence[int]) -> float:
        """Of a nat; batches are always full, so that there are as many of their size as batches and processes."""
        n_targets, *_, n_pairs = counts
        return n_pairs / self.walk.batch_size / n_targets

    def terms(
        self, objective: nn.Module, batch: PairBatch, states: CarriedStates, counts: Sequence[int], device: torch.device
    ) -> list[Term]:
        """What a batch adds to the loss of a step of ``counts``; no state is carried."""
        n_targets, *_, n_pairs = counts
        completion = sent(batch.completion, device)
        nats, log_p = objective(sent(batch.input_ids, device), sent(batch.targets, device), completion=completion)
        ratio = odds_ratio_loss(*log_p.chunk(2)).mean()
        share = self._strength * batch.n_pairs / n_pairs
        return [(nats[: batch.n_pairs].sum(), 1.0), (ratio, share * n_targets)]
