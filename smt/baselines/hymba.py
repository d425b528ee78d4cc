"""A Hymba as training and evaluation take a model: a chunk of tokens in, its loss out, and nothing carried to the next."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smt.baselines.gpt2 import NoMemory
from smt.hymba.model import Hymba
from smt.model.loss import head_loss


class ChunkedHymba(Hymba):
    """A ``Hymba`` behind the interface of runs, with parameters of the same names; each chunk begins anew."""

    def forward(self, input_ids: Tensor, state: Any = None, *, targets: Tensor) -> tuple[Tensor, NoMemory]:
        """Mean cross-entropy per target of input_ids and targets (B, T), -100 where nothing is due."""
        hidden, memory = self.encode(input_ids)
        return head_loss(hidden, self.head(), targets), memory

    def encode(self, input_ids: Tensor, state: Any = None) -> tuple[Tensor, NoMemory]:
        """Hidden states (B, T, d) after the final norm, before the head."""
        return self.hidden(input_ids), NoMemory()

    def logits(self, input_ids: Tensor) -> Tensor:
        """(B, T, V) of a chunk."""
        return super().forward(input_ids)["logits"]
