"""The training loop: rows walk along whole documents, state is carried and detached, AdamW, rates that follow the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from smt.data.walk import Batch, DocumentWalk
from smt.evaluation.perplexity import CarriedStates, Evaluation
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
        n_tokens: tokens read; as many, unless the loss counts only some of them.
        n_positions: those and the padding.
        seconds: time spent in steps, evaluations left out.
        seconds_per_token: of all steps but the first, which pays for allocations and caches; 0 before the second.
        loss: mean loss of the latest steps, in nats per target.
    """

    history: History = field(default_factory=History)
    step: int = 0
    n_targets: int = 0
    n_tokens: int = 0
    n_positions: int = 0
    seconds: float = 0.0
    seconds_per_token: float = 0.0
    loss: float = float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second of training."""
        return self.n_tokens / self.seconds if self.seconds else 0.0

    @property
    def padding(self) -> float:
        """Share of the positions that were padding."""
        return 1 - self.n_tokens / self.n_positions if self.n_positions else 0.0


def train(
    model: StrideMemoryTransformer,
    documents: Sequence[Any],
    data: DataConfig,
    training: TrainingConfig,
    clock: Clock,
    *,
    counted: Sequence[Any] | None = None,
    on_step: Callable[[Progress], None],
    on_evaluation: Callable[[Progress], Evaluation],
) -> Progress:
    """Train until the clock says that the run is over.

    Args:
        documents: tokens of each, (L,) integers: a ``TokenStore``, arrays or tensors.
        counted: of each document, (L,) bool, which tokens the loss counts; None: all but the first.
        on_step: called after every optimiser step.
        on_evaluation: evaluates the model; called ``training.evaluations`` times, evenly over the run, the last at its end;
            in a run of fewer steps, after each of them.
    """
    model.train()
    groups = parameter_groups(model, training)
    optimiser = torch.optim.AdamW(groups, betas=(training.beta_1, training.beta_2), fused=True)
    sizes = {"batch_size": data.batch_size, "length": data.chunk_length, "lanes": data.lanes}
    walk = DocumentWalk(documents, counted=counted, **sizes, seed=training.seed, together=True)
    batches = iter(walk)
    states = CarriedStates()
    done = Progress()
    recent: list[tuple[float, int]] = []
    n_evaluations = 0
    first_seconds, first_tokens = 0.0, 0
    while (progress := clock.progress) < 1:
        started = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * schedule(training, progress)
        batch = next(batches)
        reading, state = states.continued(batch)
        loss, state = _step(model, optimiser, reading, state, data, training)
        states.keep(batch, state)
        clock.steps = done.step = done.step + 1
        n_targets = reading.n_targets
        done.n_targets += n_targets
        done.n_tokens += reading.n_steps
        done.n_positions += reading.targets.numel()
        recent = [*recent[1 - LOSS_STEPS :], (loss * n_targets, n_targets)]
        done.loss = sum(nats for nats, _ in recent) / max(1, sum(count for _, count in recent))
        done.seconds += time.perf_counter() - started
        if done.step == 1:
            first_seconds, first_tokens = done.seconds, done.n_tokens
        else:
            done.seconds_per_token = (done.seconds - first_seconds) / (done.n_tokens - first_tokens)
        if done.step % LOSS_STEPS == 0 or done.step == 1:
            done.history.train_loss.append(done.loss)
            done.history.train_steps.append(done.step)
        on_step(done)
        if n_evaluations + 1 < training.evaluations and clock.progress >= (n_evaluations + 1) / training.evaluations:
            _record(done, on_evaluation(done))
            n_evaluations += 1
    if done.step not in done.history.eval_steps:  # else the last step has been evaluated already
        _record(done, on_evaluation(done))
    return done


def _step(
    model: StrideMemoryTransformer,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    state: SMTState | None,
    data: DataConfig,
    training: TrainingConfig,
) -> tuple[float, SMTState]:
    device = model.embedding.weight.device
    with precision(device):
        loss, aux = model.loss(batch.input_ids.to(device), batch.targets.to(device), state)
    # Every step weighs the same, in a full batch or in one in which rows wait.
    weight = batch.n_steps / (data.batch_size * data.chunk_length)
    if loss.requires_grad:  # with a frozen decoder it does not in a batch that is too narrow for a write
        (loss * weight).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach()), aux.state.detach()


def _record(done: Progress, evaluation: Evaluation) -> None:
    done.history.val_loss.append(evaluation.loss)
    done.history.val_ppl.append(evaluation.perplexity)
    done.history.eval_steps.append(done.step)
