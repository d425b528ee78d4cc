"""How far a run is, from 0 to 1: by the clock or by steps; the learning rate and the evaluations follow it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from smt.training.settings import TrainingConfig


class Clock:
    """Progress of a run that is bounded by steps, or by wall-clock time from ``started`` on.

    In a run bounded by time ``reserve`` seconds are kept for what comes after the last step, but never more than half of
    the time: an estimate made after a few slow steps must not end the run.
    """

    def __init__(self, config: TrainingConfig, started: float, *, now: Callable[[], float] = time.perf_counter) -> None:
        self.steps = 0
        self.reserve = 0.0
        self._limit, self._deadline = config.steps, started + 60 * config.minutes
        self._now, self._began = now, now()

    @property
    def progress(self) -> float:
        """Share of the run that is done; 1 or more: it is over."""
        if self._limit is not None:
            return self.steps / self._limit
        available = self._deadline - self._began
        available -= min(self.reserve, available / 2)
        return (self._now() - self._began) / available if available > 0 else 1.0


def schedule(config: TrainingConfig, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up from a hundredth, then ``config.lr_schedule`` down to 0 at progress 1."""
    if progress < config.warmup:
        return max(0.01, progress / config.warmup)
    remaining = min(1.0, max(0.0, (1 - progress) / (1 - config.warmup)))
    return {"cosine": 0.5 * (1 - math.cos(math.pi * remaining)), "linear": remaining, "constant": 1.0}[config.lr_schedule]
