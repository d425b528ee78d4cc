"""Batches of preference pairs, without end: every pair once in an epoch, in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smt.data.pairs import Pair, hash_pairs
from smt.data.walk import epoch_seed
from smt_kernels.linear_cross_entropy import IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class PairBatch:
    """N pairs as 2 N rows, padded on the right: the chosen of each, then the rejected of each.

    Attributes:
        input_ids: (2 N, T) int64; 0 where padding.
        targets: (2 N, T) int64, the token that follows each step; -100 where padding.
        completion: (2 N, T) bool, the targets that belong to a completion.
    """

    input_ids: Tensor
    targets: Tensor
    completion: Tensor

    @property
    def n_pairs(self) -> int:
        """N."""
        return len(self.targets) // 2

    @property
    def n_targets(self) -> int:
        """Targets of the chosen rows."""
        return int((self.targets[: self.n_pairs] != IGNORE_INDEX).sum())

    @property
    def n_steps(self) -> int:
        """Steps of all rows that are not padding."""
        return int((self.targets != IGNORE_INDEX).sum())

    def widened(self, length: int) -> PairBatch:
        """The same pairs in ``length`` columns, so that every batch has the shape of every other."""
        missing = (0, length - self.targets.shape[1])
        return replace(
            self,
            input_ids=F.pad(self.input_ids, missing),
            targets=F.pad(self.targets, missing, value=IGNORE_INDEX),
            completion=F.pad(self.completion, missing, value=False),
        )


def pair_batch(pairs: Sequence[Pair]) -> PairBatch:
    """The pairs side by side."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    width = max(len(prompt) + len(completion) - 1 for prompt, completion in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    of_completion = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        tokens = torch.tensor([*prompt, *completion], dtype=torch.int64, device="cpu")
        n_steps = len(tokens) - 1
        input_ids[row, :n_steps], targets[row, :n_steps] = tokens[:-1], tokens[1:]
        of_completion[row, len(prompt) - 1 : n_steps] = True
    return PairBatch(input_ids, targets, of_completion)


class PairWalk:
    """Batches of pairs as an iterable that can be saved and resumed between any two batches.

    A batch is always full: the pairs of the next epoch follow those of the last. The pairs of all processes are one batch cut
    in equal parts, so that two processes with N pairs read what one with 2 N reads.

    Args:
        pairs: one or more.
        batch_size: pairs of this process, N.
        seed: of the order.
        rank, world_size: which of how many processes this is.

    Raises:
        ValueError: there are no pairs.
    """

    def __init__(self, pairs: Sequence[Pair], *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not pairs:
            raise ValueError("pairs must be one or more, got none")
        self.pairs, self.batch_size, self.seed, self.rank = pairs, batch_size, seed, rank
        self._n_together = batch_size * world_size
        self._hash = hash_pairs(pairs)
        self._begin_epoch(0)

    def __iter__(self) -> Iterator[PairBatch]:
        while True:
            drawn = [self._next() for _ in range(self._n_together)]
            yield pair_batch([self.pairs[index] for index in drawn[self.rank * self.batch_size :][: self.batch_size]])

    def state_dict(self) -> dict[str, Any]:
        """Where the walk stands, in plain numbers; the same on every process."""
        return {**self._identity(), "epoch": self._epoch, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another walk over the same pairs stood; it may have had another number of processes.

        Raises:
            ValueError: it walked over other pairs, in another order or in other batches.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(f"state belongs to a walk with {name} = {state.get(name)!r}, this one has {mine!r}")
        self._begin_epoch(state["epoch"], state["taken"])

    def _identity(self) -> dict[str, Any]:
        return {"hash_of_pairs": self._hash, "pairs_of_all_processes": self._n_together, "seed": self.seed}

    def _begin_epoch(self, epoch: int, taken: int = 0) -> None:
        self._epoch, self._taken = epoch, taken
        generator = torch.Generator("cpu").manual_seed(epoch_seed(self.seed, epoch))
        self._order = torch.randperm(len(self.pairs), generator=generator, device="cpu").tolist()

    def _next(self) -> int:
        if self._taken == len(self._order):
            self._begin_epoch(self._epoch + 1)
        self._taken += 1
        return self._order[self._taken - 1]
