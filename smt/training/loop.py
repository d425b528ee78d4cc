"""The training loop: chunks of whole documents, carried and detached state, AdamW, learning rates that follow the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from smt.data.batches import Chunk, training_chunks
from smt.evaluation.perplexity import Evaluation, carried_state
from smt.model import StrideMemoryTransformer
from smt.precision import precision
from smt.state import SMTState
from smt.training.clock import Clock, schedule
from smt.training.parameter_groups import parameter_groups
from smt.training.run_folder import History
from smt.training.settings import DataConfig, TrainingConfig

# The training loss on record is the mean over this many steps.
LOSS_STEPS = 10


@dataclass
class Progress:
    """What the loop has done so far.

    Attributes:
        step: optimiser steps.
        n_targets: targets trained on, each once per epoch.
        n_positions: those and the padding.
        seconds: time spent in steps, evaluations left out.
        seconds_per_token: of all steps but the first, which pays for allocations and caches; 0 before the second.
        loss: mean loss of the latest steps, in nats per target.
    """

    history: History = field(default_factory=History)
    step: int = 0
    n_targets: int = 0
    n_positions: int = 0
    seconds: float = 0.0
    seconds_per_token: float = 0.0
    loss: float = float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Targets per second of training."""
        return self.n_targets / self.seconds if self.seconds else 0.0

    @property
    def padding(self) -> float:
        """Share of the positions that were padding."""
        return 1 - self.n_targets / self.n_positions if self.n_positions else 0.0


def train(
    model: StrideMemoryTransformer,
    documents: list[torch.Tensor],
    data: DataConfig,
    training: TrainingConfig,
    clock: Clock,
    *,
    on_step: Callable[[Progress], None],
    on_evaluation: Callable[[Progress], Evaluation],
) -> Progress:
    """Train until the clock says that the run is over.

    Args:
        documents: tokens (L,) int64 of each.
        on_step: called after every optimiser step.
        on_evaluation: evaluates the model; called ``training.evaluations`` times, evenly over the run, the last at its end.
    """
    model.train()
    groups = parameter_groups(model, training)
    optimiser = torch.optim.AdamW(groups, betas=(training.beta_1, training.beta_2), fused=True)
    chunks = training_chunks(
        documents, batch_size=data.batch_size, length=data.chunk_length, lanes=data.lanes, seed=training.seed
    )
    states: dict[int, SMTState] = {}
    done = Progress()
    recent: list[tuple[float, int]] = []
    n_evaluations = 0
    first_seconds, first_targets = 0.0, 0
    while (progress := clock.progress) < 1:
        started = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * schedule(training, progress)
        chunk = next(chunks)
        loss, states[chunk.lane] = _step(model, optimiser, chunk, carried_state(states, chunk), data, training)
        clock.steps = done.step = done.step + 1
        n_targets = chunk.n_targets
        done.n_targets += n_targets
        done.n_positions += chunk.targets.numel()
        recent = [*recent[1 - LOSS_STEPS :], (loss * n_targets, n_targets)]
        done.loss = sum(nats for nats, _ in recent) / sum(count for _, count in recent)
        done.seconds += time.perf_counter() - started
        if done.step == 1:
            first_seconds, first_targets = done.seconds, done.n_targets
        else:
            done.seconds_per_token = (done.seconds - first_seconds) / (done.n_targets - first_targets)
        if done.step % LOSS_STEPS == 0 or done.step == 1:
            done.history.train_loss.append(done.loss)
            done.history.train_steps.append(done.step)
        on_step(done)
        if n_evaluations + 1 < training.evaluations and clock.progress >= (n_evaluations + 1) / training.evaluations:
            _record(done, on_evaluation(done))
            n_evaluations += 1
    _record(done, on_evaluation(done))
    return done


def _step(
    model: StrideMemoryTransformer,
    optimiser: torch.optim.Optimizer,
    chunk: Chunk,
    state: SMTState | None,
    data: DataConfig,
    training: TrainingConfig,
) -> tuple[float, SMTState]:
    device = model.embedding.weight.device
    with precision(device):
        loss, aux = model.loss(chunk.input_ids.to(device), chunk.targets.to(device), state)
    # Every target weighs the same, in a full chunk or in one that has lost rows.
    weight = chunk.n_targets / (data.batch_size * data.chunk_length)
    if loss.requires_grad:  # with a frozen decoder it does not in a chunk that is too short for a write
        (loss * weight).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach()), aux.state.detach()


def _record(done: Progress, evaluation: Evaluation) -> None:
    done.history.val_loss.append(evaluation.loss)
    done.history.val_ppl.append(evaluation.perplexity)
    done.history.eval_steps.append(done.step)
