"""What a run has done so far: its counts and its losses."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from smt.runtime.files import read_json
from smt.training.run_files import HISTORY_FILE

# The training loss on record is the mean over this many optimiser steps.
LOSS_STEPS = 10


@dataclass
class History:
    """Losses over the run, by optimiser step; those of held-out pairs are empty where a stage has none."""

    train_loss: list[float] = field(default_factory=list)
    train_steps: list[int] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_ppl: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    pair_loss: list[float] = field(default_factory=list)
    reward_accuracy: list[float] = field(default_factory=list)
    log_odds_margin: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, list[float]]:
        """What ``metrics_history.json`` records."""
        of_pairs = ("pair_loss", "reward_accuracy", "log_odds_margin")
        return {name: values for name, values in asdict(self).items() if values or name not in of_pairs}

    @classmethod
    def read(cls, folder: str | Path) -> History:
        """The losses of the run in ``folder``.

        Raises:
            ValueError: there are none, or the file is damaged.
        """
        path = Path(folder) / HISTORY_FILE
        if not path.is_file():
            raise ValueError(f"there is no {path}; smt train leaves one in the folder of a run")
        values, needed = read_json(path), ("train_loss", "train_steps", "val_loss", "eval_steps")
        if not all(isinstance(values.get(name), list) for name in needed):
            raise ValueError(f"{path} must hold the lists {', '.join(needed)}")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


@dataclass
class Progress:
    """What the training loop has done so far, on all processes together.

    Attributes:
        step: optimiser steps.
        n_targets: targets trained on, each once per epoch.
        n_tokens: tokens read; as many, unless the loss counts only some of them.
        n_positions: those and the padding.
        seconds: time spent in steps, evaluations and checkpoints left out.
        first_seconds, first_tokens: of the first step since the process began, which pays for allocations and caches.
        pace: seconds per token of the latest ``LOSS_STEPS`` steps since that one.
        recent: nats and targets of the latest ``LOSS_STEPS`` steps whose losses are known.
        best: the evaluation with the lowest held-out loss of what is trained, and at which step (``best_val_loss``,
            ``best_val_ppl``, ``best_step``).
        unimproved: evaluations since then.
    """

    history: History = field(default_factory=History)
    step: int = 0
    n_targets: int = 0
    n_tokens: int = 0
    n_positions: int = 0
    seconds: float = 0.0
    first_seconds: float = 0.0
    first_tokens: int = 0
    pace: list[float] = field(default_factory=list)
    recent: list[tuple[float, int]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    unimproved: int = 0

    def add(self, n_targets: int, n_tokens: int, n_positions: int, *, steps: int = 1) -> None:
        """Count an optimiser step, or with ``steps`` = -1 take it back."""
        self.step += steps
        self.n_targets += steps * n_targets
        self.n_tokens += steps * n_tokens
        self.n_positions += steps * n_positions

    def tell(self, step: int, nats: float, n_targets: int) -> None:
        """Note the loss of a step; steps come in order."""
        self.recent = [*self.recent[1 - LOSS_STEPS :], (nats, n_targets)]
        if step % LOSS_STEPS == 0 or step == 1:
            self.history.train_loss.append(self.loss)
            self.history.train_steps.append(step)

    def end_step(self, seconds: float, n_tokens: int, *, is_first: bool) -> None:
        """Note what a step took; ``is_first``: what has been counted so far was the first step of this process."""
        if is_first:
            self.first_seconds, self.first_tokens, self.pace = self.seconds, self.n_tokens, []
        elif n_tokens:
            self.pace = [*self.pace[1 - LOSS_STEPS :], seconds / n_tokens]

    @property
    def loss(self) -> float:
        """Mean loss of the latest steps, in nats per target; NaN before the first."""
        n_targets = sum(count for _, count in self.recent)
        return sum(nats for nats, _ in self.recent) / n_targets if n_targets else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second of training; of a process with more steps than one without the first, in which it compiles."""
        n_tokens, seconds = self.n_tokens - self.first_tokens, self.seconds - self.first_seconds
        if self.first_tokens and n_tokens and seconds:
            return n_tokens / seconds
        return self.n_tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_per_token(self) -> float:
        """The median of the latest steps, of which some may have compiled; 0 before the second of this process."""
        return statistics.median(self.pace) if self.pace else 0.0

    @property
    def padding(self) -> float:
        """Share of the positions that were padding."""
        return 1 - self.n_tokens / self.n_positions if self.n_positions else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """The inverse of ``to_dict``."""
        recent = [(nats, count) for nats, count in values["recent"]]
        return cls(**{**values, "history": History(**values["history"]), "recent": recent})
