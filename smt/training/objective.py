"""What is trained: the loss of one chunk of documents, given the memory that the chunk begins with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        if torch.is_grad_enabled() and not loss.requires_grad:
            # With a frozen decoder, a chunk too narrow for a write trains nothing; other processes still wait for this one.
            trained = next(parameter for parameter in self.parameters() if parameter.requires_grad)
            loss = loss + 0.0 * trained.sum()
        return loss, None if aux.state is None else aux.state.detach()
