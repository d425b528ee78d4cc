"""An optimiser step that a device may still be computing: its numbers, and what to go back to if they are not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smt.state.carried import CarriedStates


class HostCopy:
    """Numbers on their way from a device; who asks for them waits for what has made them, and for nothing that came later."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._arrival = None
        if numbers.device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(numbers.device))

    def tolist(self) -> list[float]:
        """The numbers."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._numbers.tolist()


@dataclass(frozen=True)
class TakenStep:
    """What is known of a step when it has been launched.

    Attributes:
        step: its number.
        learning_rate: of the first parameter group.
        numbers: the sum of nats over all processes, and the gradient's norm.
        n_targets, n_tokens, n_positions: as ``Progress`` counts them.
        place, states: of the walk and of its rows, before it.
    """

    step: int
    learning_rate: float
    numbers: HostCopy
    n_targets: int
    n_tokens: int
    n_positions: int
    place: dict[str, Any]
    states: CarriedStates
