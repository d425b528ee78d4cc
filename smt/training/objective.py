"""What is trained: the loss of a chunk of documents, given the memory that it begins with; log-probabilities of pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smt.model.loss import target_nats


class ChunkLoss(nn.Module):
    """The module that distributed training wraps: all that a step computes happens in its ``forward``.

    Args:
        model: gives a mean per target, and an object with the next ``state``, for ``input_ids, state, targets=targets``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor, state: Any) -> tuple[Tensor, Any]:
        """input_ids and targets (B, T), -100 where nothing is due -> mean nats per target, and the state without its graph.

        Truncated backpropagation through time: the next chunk continues from this state, its gradient ends there.
        """
        loss, aux = self.model(input_ids, state, targets=targets)
        return self._trained(loss), None if aux.state is None else aux.state.detach()

    def _trained(self, value: Tensor) -> Tensor:
        """The value, with a gradient: other processes wait for that of this one.

        With a frozen decoder, a chunk too narrow for a write has none of its own.
        """
        if not torch.is_grad_enabled() or value.requires_grad:
            return value
        trained = next(parameter for parameter in self.parameters() if parameter.requires_grad)
        return value + 0.0 * trained.sum()


class PairLogProbabilities(ChunkLoss):
    """How likely completions are; and the loss of a chunk, because distributed training wraps one module, and one ``forward``.

    Args:
        model: as of ``ChunkLoss``, with an ``encode`` of ``input_ids`` that gives hidden states before the tied head.
    """

    def forward(
        self, input_ids: Tensor, targets: Tensor, state: Any = None, completion: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Sums of nats over all targets of each row, and the mean log-probability of its completion, both (B,).

        Every row begins with nothing in memory.

        Args:
            input_ids, targets: (B, T), -100 where nothing is due.
            state: of a chunk.
            completion: (B, T) bool, the targets that belong to the completion, one or more in each row; None: give what
                ``ChunkLoss`` gives.
        """
        if completion is None:
            return super().forward(input_ids, targets, state)
        hidden, _ = self.model.encode(input_ids)
        nats = target_nats(hidden, self.model.embedding.weight, targets)
        log_p = -nats.masked_fill(~completion, 0.0).sum(1) / completion.sum(1)
        return self._trained(nats.sum(1)), log_p
