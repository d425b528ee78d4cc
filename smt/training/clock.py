"""How far a run is, from 0 to 1: by steps, by targets or by the clock; the learning rate and the evaluations follow it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from smt.training.settings import TrainingConfig


class Clock:
    """Progress of a run that is bounded by steps, by epochs, or by wall-clock time from ``started`` on.

    In a run bounded by time ``reserve`` seconds are kept for what comes after the last step, but never more than half of
    the time: an estimate made after a few slow steps must not end the run.

    Args:
        started: when the run began, as ``now`` tells it.
        epoch_targets: targets in the training documents, for a run bounded by epochs.
    """

    def __init__(
        self,
        config: TrainingConfig,
        started: float,
        *,
        epoch_targets: int = 0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.steps, self.targets, self.reserve = 0, 0, 0.0
        self._steps, self._targets = config.steps, None if config.epochs is None else config.epochs * epoch_targets
        self._now, self._began = now, now()
        self._deadline = started + 60 * config.minutes

    @property
    def progress(self) -> float:
        """Share of the run that is done; 1 or more: it is over."""
        if self._steps is not None:
            return self.steps / self._steps
        if self._targets is not None:
            return self.targets / self._targets
        available = self._deadline - self._began
        available -= min(self.reserve, available / 2)
        return (self._now() - self._began) / available if available > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        """The time that has been used and that remains; counts are kept elsewhere."""
        now = self._now()
        return {"used": now - self._began, "remaining": self._deadline - now}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on as if no time had passed since."""
        now = self._now()
        self._began, self._deadline = now - state["used"], now + state["remaining"]


def schedule(config: TrainingConfig, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up from a hundredth, then ``config.lr_schedule`` down to 0 at progress 1."""
    if progress < config.warmup:
        return max(0.01, progress / config.warmup)
    remaining = min(1.0, max(0.0, (1 - progress) / (1 - config.warmup)))
    return {"cosine": 0.5 * (1 - math.cos(math.pi * remaining)), "linear": remaining, "constant": 1.0}[config.lr_schedule]
