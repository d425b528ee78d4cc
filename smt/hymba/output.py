"""What a forward pass gives: ``logits``, formed when they are asked for, and, if there are targets, ``loss``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


class HymbaOutput(Mapping[str, Tensor]):
    """``output["loss"]``, mean nats per target, and ``output["logits"]``, (B, T, V), which cost nothing until then.

    Logits are formed once, with a gradient if the forward pass had one; an optimiser step before that is in them.

    Args:
        hidden: (B, T, d) after the final norm.
        weight: (V, d) of the head.
        loss: None where there were no targets.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, loss: Tensor | None = None) -> None:
        self.hidden, self._weight, self._loss = hidden, weight, loss
        self._logits: Tensor | None = None
        self._had_gradient = torch.is_grad_enabled()

    def __getitem__(self, name: str) -> Tensor:
        if name == "loss" and self._loss is not None:
            return self._loss
        if name == "logits":
            if self._logits is None:
                with torch.set_grad_enabled(self._had_gradient):
                    self._logits = F.linear(self.hidden, self._weight)
            return self._logits
        raise KeyError(f"{name!r}: there are {', '.join(self)}" + (", and loss with targets" if name == "loss" else ""))

    def __iter__(self) -> Iterator[str]:
        return iter(("logits",) if self._loss is None else ("loss", "logits"))

    def __len__(self) -> int:
        return 1 if self._loss is None else 2
