"""The held-out documents that a model is measured on: the first so many of a split, whole or cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smt.data.parts import Parts
from smt.data.walk import DocumentWalk

if TYPE_CHECKING:
    from smt.data.store import TokenStore


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Documents to predict.

    Attributes:
        documents: tokens of each, (L,).
        counted: of each, (L,) bool, which tokens the loss counts; None: all but the first.
        n_bytes: of UTF-8 text that the targets of all spell.
    """

    documents: Sequence[Any]
    counted: Sequence[Any] | None
    n_bytes: int

    @classmethod
    def of(cls, split: TokenStore, count: int | None = None) -> HeldOut:
        """The first ``count`` documents of a split; None: all."""
        indices = range(len(split))[:count]
        counted = None if split.counted is None else [split.counted[index] for index in indices]
        return cls([split[index] for index in indices], counted, sum(split.n_bytes[:count]))

    def pieces(self, length: int) -> HeldOut:
        """The same targets in documents of at most ``length`` of them: nothing is carried from one to the next."""
        counted = None if self.counted is None else Parts(self.counted, length)
        return HeldOut(Parts(self.documents, length), counted, self.n_bytes)

    @property
    def n_steps(self) -> int:
        """Tokens that are read to predict the next."""
        return sum(len(document) - 1 for document in self.documents)

    @property
    def n_targets(self) -> int:
        """Tokens that the loss counts."""
        return self.n_steps if self.counted is None else sum(int(flags[1:].sum()) for flags in self.counted)

    def walk(self, **sizes: int) -> DocumentWalk:
        """Batches of all documents, each read once; ``sizes`` of ``DocumentWalk``."""
        return DocumentWalk.once(self.documents, counted=self.counted, **sizes)
