"""How far a run is, from 0 to 1: by steps, by targets or by the clock; the learning rate and the evaluations follow it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from smt.training.settings import TrainingConfig


class Clock:
    """Progress of a run that is bounded by steps, by epochs, or by wall-clock time from ``started`` on.

    In a run bounded by time, progress is the share of the time for steps. That leaves out what comes after the last of them,
    and the evaluations before it; both are estimates, which may be made after a few slow steps, so they never take more than
    half of the time.

    Args:
        started: when the run began, as ``now`` tells it.
        epoch_targets: targets in the training documents, for a run bounded by epochs.

    Attributes:
        steps, targets: what has been trained, for a run that they bound.
        reserve: seconds that are expected after the last step.
        evaluation: seconds that are expected of an evaluation.
    """

    def __init__(
        self,
        config: TrainingConfig,
        started: float,
        *,
        epoch_targets: int = 0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.steps, self.targets, self.reserve, self.evaluation = 0, 0, 0.0, 0.0
        self._steps, self._targets = config.steps, None if config.epochs is None else config.epochs * epoch_targets
        self._now, self._began = now, now()
        self._deadline = started + 60 * config.minutes
        self._evaluations = config.evaluations if config.eval_steps is None else 1  # the last one is in the reserve

    @property
    def progress(self) -> float:
        """Share of the run that is done; 1 or more: it is over."""
        if self._steps is not None:
            return self.steps / self._steps
        if self._targets is not None:
            return self.targets / self._targets
        now = self._now()
        kept = self._kept if self.has_time_to_evaluate else min(self.reserve, self._half)
        passed, left = now - self._began, self._deadline - kept - now
        return passed / (passed + left) if left > 0 else 1.0

    @property
    def has_time_to_evaluate(self) -> bool:
        """Whether evaluations before the last one leave half of the time to train; always, if time is no bound."""
        return self._steps is not None or self._targets is not None or self._kept <= self._half

    @property
    def _half(self) -> float:
        return max(0.0, self._deadline - self._began) / 2

    @property
    def _kept(self) -> float:
        """Seconds from now on in which nothing is trained."""
        return self.reserve + (self._evaluations - 1) * self.evaluation

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In it time does not count as passed, and one evaluation less is expected."""
        started = self._now()
        yield
        self._began += self._now() - started
        self._evaluations = max(1, self._evaluations - 1)

    def state_dict(self) -> dict[str, float]:
        """The time that has been used and that remains; counts are kept elsewhere."""
        now = self._now()
        return {"used": now - self._began, "remaining": self._deadline - now, "evaluations": self._evaluations}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on as if no time had passed since."""
        now = self._now()
        self._began, self._deadline = now - state["used"], now + state["remaining"]
        self._evaluations = int(state["evaluations"])


def schedule(config: TrainingConfig, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up from a hundredth, then ``config.lr_schedule`` down to 0 at progress 1."""
    if progress < config.warmup:
        return max(0.01, progress / config.warmup)
    remaining = min(1.0, max(0.0, (1 - progress) / (1 - config.warmup)))
    return {"cosine": 0.5 * (1 - math.cos(math.pi * remaining)), "linear": remaining, "constant": 1.0}[config.lr_schedule]
