"""Rows that walk along documents: memory runs through each document from its first token to its last, and no further.

Every row takes a document, reads it ``length`` steps at a time, and takes the next when it has come to its end. The last step
of a chunk predicts the first token of the next, so every token but a document's first is a target exactly once, unless it is
said which of them the loss counts. Several groups of rows (*lanes*) take turns, so that consecutive batches see different
documents although each is read to its end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from smt_kernels.linear_cross_entropy import IGNORE_INDEX

# A document is drawn from this many documents per row of similar length: enough to mix, similar enough to end together.
BUCKET = 8
WAITING = -1


@dataclass(frozen=True, eq=False)
class Batch:
    """The next steps of the rows of one lane.

    A row that reads stands at the left: its k <= T steps are the first k columns, k = T unless its document ends here. What
    follows is padding; no step before sees it, and the state that it leaves is discarded, because the next batch of this lane
    resets the row. A row that waits has no step at all, and nothing to keep a state for.

    Attributes:
        lane: which of the groups of rows that take turns; each has a state of its own.
        input_ids: (B, T) int64; 0 where not valid.
        targets: (B, T) int64, the token that follows each step; -100 where not valid, or where the loss does not count it.
        valid: (B, T) bool, the steps that are read.
        reset: (B,) bool, rows that begin a document here: their state is that before any token.
        documents: (B,) int64, which document each row reads; -1 where it waits.
        positions: (B,) int64, the step of its document at which the row goes on.
    """

    lane: int
    input_ids: Tensor
    targets: Tensor
    valid: Tensor
    reset: Tensor
    documents: Tensor
    positions: Tensor

    @property
    def n_steps(self) -> int:
        """Steps that are not padding."""
        return int(self.valid.sum())

    @property
    def n_targets(self) -> int:
        """Targets that the loss counts."""
        return int((self.targets != IGNORE_INDEX).sum())

    @property
    def reading(self) -> Tensor:
        """(B,) bool, rows that do not wait."""
        return self.documents != WAITING

    def places(self) -> list[tuple[int, int, int]]:
        """Of each row the document, the position at which it goes on there, and how many steps it reads."""
        return list(zip(self.documents.tolist(), self.positions.tolist(), self.valid.sum(1).tolist(), strict=True))

    def rows(self, index: Tensor) -> Batch:
        """The rows that ``index`` (int64, or bool of shape (B,)) names."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "lane"})

    def to(self, device: torch.device | str) -> Batch:
        """Every tensor on ``device``."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "lane"})


class DocumentWalk(IterableDataset):
    """Batches of documents walked in order, as an iterable that can be saved and resumed between any two batches.

    Iterating goes on from where the walk stands; a walk that has come to its end stands at its beginning again. The rows of
    all processes are one batch cut in equal parts: two processes with B rows read what one with 2 B rows reads. It is what a
    ``DataLoader`` takes with ``batch_size=None``; a worker of its own reads ahead, and the walk to save is then the worker's.

    Args:
        documents: tokens of each, (L,) integers with L >= 2: a ``TokenStore``, or arrays or tensors.
        counted: of each document, (L,) bool, which tokens are targets; None: all but the first.
        batch_size: rows of this process, B.
        length: steps of a row in one batch, T; a batch is shorter where no row has that many left.
        lanes: groups of rows that take turns.
        epochs: how often every document is read; None: without end.
        shuffle: draw the documents of each epoch in an order that ``seed`` fixes, those of similar length near each other;
            False: the longest first.
        seed: of the order.
        together: the rows of a lane begin documents together, those whose documents end before wait: for a model whose rows
            must be at the same step. Otherwise a row takes its next document at once.
        rank, world_size: which of how many processes this is.

    Raises:
        ValueError: a size below 1, no documents or one of a single token, ``counted`` of another number, or a rank that
            does not exist.
    """

    def __init__(
        self,
        documents: Sequence[Any],
        *,
        counted: Sequence[Any] | None = None,
        batch_size: int,
        length: int,
        lanes: int = 1,
        epochs: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        together: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("length", length), ("lanes", lanes), ("epochs", epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..world_size - 1 = 0..{world_size - 1}, got {rank}")
        self.documents = documents
        self._n_steps = [len(documents[index]) - 1 for index in range(len(documents))]
        if min(self._n_steps, default=0) < 1:
            shortest = f", one of {min(self._n_steps) + 1}" if self._n_steps else ""
            raise ValueError(f"documents must be one or more, each of at least 2 tokens, got {len(documents)}{shortest}")
        if counted is not None and len(counted) != len(documents):
            raise ValueError(f"counted must be given for each of {len(documents)} documents, got {len(counted)}")
        self.counted = counted
        self.batch_size, self.length, self.lanes, self.epochs = batch_size, length, lanes, epochs
        self.shuffle, self.seed, self.together, self.rank, self.world_size = shuffle, seed, together, rank, world_size
        self._n_rows = batch_size * world_size
        self._start()

    @classmethod
    def once(cls, documents: Sequence[Any], **options: Any) -> DocumentWalk:
        """As evaluations walk: every document once, the longest first, and rows begin together."""
        return cls(documents, epochs=1, shuffle=False, together=True, **options)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(f"a walk has one order: num_workers must be 0 or 1, got {worker.num_workers}")
        while (lane := self._next_lane()) is not None:
            rows = self._rows[lane]
            left = [self._n_steps[document] - position if document != WAITING else 0 for document, position in rows]
            width = min(self.length, max(left))
            mine = rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            batch = self._batch(lane, mine, width)
            self._rows[lane] = [
                (document, position + width) if steps > width else (WAITING, 0)
                for (document, position), steps in zip(rows, left, strict=True)
            ]
            self._lane = (lane + 1) % self.lanes
            yield batch
        self._start()

    def state_dict(self) -> dict[str, Any]:
        """Where the walk stands, in plain numbers; the same on every process."""
        return {**self._identity(), "epoch": self._epoch, "taken": self._taken, "lane": self._lane,
                "rows": [[list(row) for row in lane] for lane in self._rows]}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another walk over the same documents stood; it may have had another number of processes.

        Raises:
            ValueError: it walked over other documents, in another order or with other sizes.
        """
        for name, mine in self._identity().items():
            if state[name] != mine:
                raise ValueError(f"state belongs to a walk with {name} = {state[name]!r}, this one has {mine!r}")
        self._rows = [[(document, position) for document, position in lane] for lane in state["rows"]]
        self._lane = state["lane"]
        self._begin_epoch(state["epoch"], state["taken"])

    def _identity(self) -> dict[str, Any]:
        return {
            "n_documents": len(self._n_steps),
            "n_steps": sum(self._n_steps),
            "rows_of_all_processes": self._n_rows,
            **{name: getattr(self, name) for name in ("length", "lanes", "epochs", "shuffle", "seed", "together")},
        }

    def _start(self) -> None:
        self._lane = 0
        self._rows = [[(WAITING, 0)] * self._n_rows for _ in range(self.lanes)]
        self._begin_epoch(0)

    def _begin_epoch(self, epoch: int, taken: int = 0) -> None:
        self._epoch, self._taken = epoch, taken
        generator = torch.Generator("cpu").manual_seed(epoch_seed(self.seed, epoch)) if self.shuffle else None
        self._order = epoch_order(self._n_steps, self._n_rows, generator)

    def _next_lane(self) -> int | None:
        """The next lane with a row that reads, after its rows have taken documents; None: the walk has ended."""
        for turn in range(self.lanes):
            lane = (self._lane + turn) % self.lanes
            self._take(lane)
            if any(document != WAITING for document, _ in self._rows[lane]):
                return lane
        return None

    def _take(self, lane: int) -> None:
        """Rows without a document take the next ones."""
        rows = self._rows[lane]
        if self.together and any(document != WAITING for document, _ in rows):
            return
        for row, (document, _) in enumerate(rows):
            if document != WAITING:
                continue
            if self._taken == len(self._order):
                last = self.epochs is not None and self._epoch + 1 == self.epochs
                # Documents of two epochs differ in length: rows that read together do not mix them.
                if last or (self.together and row):
                    return
                self._begin_epoch(self._epoch + 1)
            rows[row] = (self._order[self._taken], 0)
            self._taken += 1

    def _batch(self, lane: int, rows: list[tuple[int, int]], width: int) -> Batch:
        import numpy as np

        input_ids = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
        targets = torch.full_like(input_ids, IGNORE_INDEX)
        valid = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (document, position) in enumerate(rows):
            if document != WAITING:
                piece = np.asarray(self.documents[document][position : position + width + 1])
                piece = torch.from_numpy(piece.astype(np.int64))
                n_steps = len(piece) - 1
                input_ids[row, :n_steps], targets[row, :n_steps], valid[row, :n_steps] = piece[:-1], piece[1:], True
                if self.counted is not None:
                    counted = np.asarray(self.counted[document][position + 1 : position + width + 1])
                    targets[row, :n_steps][torch.from_numpy(~counted)] = IGNORE_INDEX
        documents, positions = torch.tensor(rows, dtype=torch.int64, device="cpu").unbind(1)
        reset = (documents != WAITING) & (positions == 0)
        return Batch(lane, input_ids, targets, valid, reset, documents, positions)


def epoch_order(n_steps: Sequence[int], n_rows: int, generator: torch.Generator | None) -> list[int]:
    """All documents once: the longest first, or drawn at random so that ``n_rows`` of similar length follow each other.

    Args:
        n_steps: how long each document is.
        n_rows: how many rows take documents at the same time.
        generator: what draws; None: the longest first.
    """
    by_length = sorted(range(len(n_steps)), key=lambda index: -n_steps[index])
    if generator is None:
        return by_length
    mixed: list[int] = []
    for start in range(0, len(by_length), BUCKET * n_rows):
        bucket = by_length[start : start + BUCKET * n_rows]
        mixed += [bucket[index] for index in torch.randperm(len(bucket), generator=generator, device="cpu").tolist()]
    groups = [mixed[start : start + n_rows] for start in range(0, len(mixed), n_rows)]
    # The group that is not full stays last: before it, groups begin where rows that read together begin.
    order = [*torch.randperm(len(mixed) // n_rows, generator=generator, device="cpu").tolist(), len(groups) - 1]
    return [index for drawn in dict.fromkeys(order) for index in groups[drawn]]


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed of its own for each epoch of each seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "big") >> 1
