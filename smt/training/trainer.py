"""The training loop: a stage gives batches and their losses, memory is carried and cut from its graph, AdamW follows the clock.

Accelerate does what depends on the machine: one process or many (DDP, or FSDP 2), autocast, accumulation. Every process has
its own rows of every batch, so two processes of B rows train what one of 2 B rows trains. What an optimiser step descends, over
the rows of all processes and all batches that it accumulates, is the stage's (``smt.training.stage``).

On a GPU the next step is launched before the numbers of this one are read (``taken_step``), so that the device always has work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smt.evaluation.perplexity import Evaluation
from smt.state.carried import CarriedStates
from smt.training.checkpoints import Snapshot
from smt.training.clock import Clock, schedule
from smt.training.parameter_groups import parameter_groups
from smt.training.progress import LOSS_STEPS, Progress
from smt.training.settings import TrainingConfig
from smt.training.sharding import is_sharded, placed_like, whole
from smt.training.stage import Preference, Pretraining
from smt.training.taken_step import HostCopy, TakenStep

if TYPE_CHECKING:
    from accelerate import Accelerator

# Where gradients do not fit into fp16 even at this scale, no smaller one will help.
LEAST_LOSS_SCALE = 1.0
CPU_GENERATOR, CUDA_GENERATOR = "generator.cpu", "generator.cuda"
CARRIED = "carried."


class DivergedError(ValueError):
    """A loss or a gradient is not finite; the message says in which step and at which learning rate."""

    def __init__(self, what: str, step: int, learning_rate: float) -> None:
        super().__init__(f"{what} in step {step:,} at a learning rate of {learning_rate:.3g}")


class Trainer:
    """A model in training, between any two optimiser steps.

    Attributes:
        model: the model itself, whatever wraps it.
        objective: what gives its losses, of the stage and of held-out text, as Accelerate has prepared it.
        progress: what has been done.
        evaluation: the latest one in this process; None: there was none.
        learning_rate: of the first parameter group, in the latest step.

    Args:
        model: what ``ChunkLoss`` takes, with ``parts`` and ``config``: a ``StrideMemoryTransformer``, or a baseline.
        stage: what is trained; of several processes each has the stage of its rank.
        clock: says how far the run is; of several processes the first one's counts.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stage: Pretraining | Preference,
        training: TrainingConfig,
        clock: Clock,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.training, self.clock, self.accelerator = model, training, clock, accelerator
        groups = parameter_groups(model, training)
        optimiser = torch.optim.AdamW(groups, betas=(training.beta_1, training.beta_2), fused=True)
        self.objective, self._optimiser = accelerator.prepare(stage.objective(model), optimiser)
        self._stage, self._walk = stage, stage.walk
        self._states = CarriedStates()
        on_gpu = accelerator.device.type == "cuda"
        # What a GPU has compiled or chosen for one shape serves every step.
        self._keeps_shapes = on_gpu or training.compiles(accelerator.device)
        # Reading a number waits for the device, which then waits for the next step to be prepared. So the numbers of a step are
        # read when the next one has been launched; until then the optimiser itself skips what is not finite, and all after it.
        # Loss scales decide by themselves what to skip, and fused optimisers take no plain flag beside parameters in parts.
        self._reads_late = on_gpu and accelerator.scaler is None and not is_sharded(model)
        self._skips = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        self._taken: list[TakenStep] = []
        self.progress = Progress()
        self.evaluation: Evaluation | None = None
        self.learning_rate = 0.0

    def train(
        self,
        evaluate: Callable[[], Evaluation],
        *,
        on_step: Callable[[], None] = lambda: None,
        on_best: Callable[[], None] = lambda: None,
        on_checkpoint: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Train until the clock says that the run is over, or evaluations no longer improve.

        Args:
            evaluate: evaluates the model, evenly over the run or every ``eval_steps``, the last time at its end; in a run of
                fewer steps, after each of them.
            on_step: called after every optimiser step.
            on_best: called after an evaluation that beats all before.
            on_checkpoint: called where a checkpoint is due: every ``save_steps``, and after an evaluation.

        Returns:
            the last evaluation.

        Raises:
            DivergedError: a loss or a gradient that is not finite. The model then is what it was before that step; its
                evaluation and its checkpoint have been made, unless the held-out loss is not finite either.
        """

        def evaluated() -> Evaluation:
            with self.clock.evaluating():
                evaluation = evaluate()
            for loss in (evaluation.loss, evaluation.criterion):
                if not math.isfinite(loss):
                    raise DivergedError(f"the held-out loss is {loss}", self.progress.step, self.learning_rate)
            self.evaluation = evaluation
            if self._record(evaluation):
                on_best()
            on_checkpoint()
            return evaluation

        self.objective.train()
        batches = iter(self._walk)
        is_first, progress = True, self._of_main_process(self.clock.progress)
        while progress < 1 and not self._has_stopped_improving():
            try:
                self._step(batches, progress, is_first=is_first)
                is_first = False
                on_step()
                progress = self._of_main_process(self.clock.progress)
                evaluation_is_due = progress < 1 and self._evaluation_is_due(progress)
                checkpoint_is_due = self.progress.step % self.training.save_steps == 0
                if evaluation_is_due or checkpoint_is_due or progress >= 1:
                    self._read()
            except DivergedError:
                with suppress(DivergedError):  # of the same weights on other text: the first one says enough
                    if self.progress.step not in self.progress.history.eval_steps:
                        evaluated()
                    elif self.evaluation is None:
                        self.evaluation = evaluate()
                raise
            if evaluation_is_due:
                evaluated()
                progress = self._of_main_process(self.clock.progress)
            elif checkpoint_is_due:
                on_checkpoint()
        if self.progress.step not in self.progress.history.eval_steps:
            return evaluated()
        return self.evaluation or evaluate()  # a run that is resumed behind its last evaluation has it on record, and no more

    def _step(self, batches: Iterator[Any], progress: float, *, is_first: bool) -> None:
        """One optimiser step, of ``gradient_accumulation_steps`` batches.

        Raises:
            DivergedError: the loss or the gradient is not finite, of this step or of the one before. Nothing has been trained
                in it and since, and the walk and the states are those before it.
        """
        started, device = time.perf_counter(), self.accelerator.device
        if self.training.compile == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # what graphs returned in the step before is not used any more
        place, states = self._walk.state_dict(), self._states.copy()
        share = schedule(self.training, progress)
        for group in self._optimiser.param_groups:
            group["lr"] = group["peak"] * share
        self.learning_rate = self._optimiser.param_groups[0]["lr"]

        stage = self._stage
        shaped = stage.full_shape if self._keeps_shapes else lambda batch: batch
        accumulated = [shaped(next(batches)) for _ in range(self.training.gradient_accumulation_steps)]
        counts = torch.tensor([stage.counts(batch) for batch in accumulated], dtype=torch.int64, device="cpu").sum(0)
        counts = self.total(counts).tolist()
        n_targets, n_steps, n_positions = counts[:3]
        weight = stage.weight(counts)
        # A GPU has little use for float64.
        nats = torch.zeros((), device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
        for batch in accumulated:
            with self.accelerator.accumulate(self.objective):
                terms = stage.terms(self.objective, batch, self._states, counts, device)
                self.accelerator.backward(sum(mean * (factor * weight) for mean, factor in terms))
            for mean, factor in terms:
                nats += mean.detach().to(nats.dtype) * factor
        nats = self.total(nats)
        norm = whole(self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.clip)).to(nats)
        numbers = HostCopy(torch.stack([nats, norm]))
        step = self.progress.step + 1
        taken = TakenStep(step, self.learning_rate, numbers, n_targets, n_steps, n_positions, place, states)
        if self._reads_late:
            self._skips.logical_or_(~(nats.isfinite() & norm.isfinite()))
            self._optimiser.optimizer.found_inf = self._skips.float()
        else:
            self._check(taken)
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._taken.append(taken)
        self.progress.add(n_targets, n_steps, n_positions)
        self.clock.steps, self.clock.targets = self.progress.step, self.progress.n_targets
        self.progress.seconds += time.perf_counter() - started
        self._read(unread=1 if self._reads_late and not is_first else 0)
        self.progress.end_step(time.perf_counter() - started, n_steps, is_first=is_first)

    def _read(self, unread: int = 0) -> None:
        """Wait for the steps that have been taken, but the latest ``unread``, and note their losses.

        Raises:
            DivergedError: one of them was not finite; nothing has been trained in it and since.
        """
        while len(self._taken) > unread:
            started, taken = time.perf_counter(), self._taken[0]
            nats = self._check(taken)
            del self._taken[0]
            self.progress.tell(taken.step, nats, taken.n_targets)
            self.progress.seconds += time.perf_counter() - started
            if taken.step % LOSS_STEPS == 0:
                rates = {"learning_rate": taken.learning_rate, "tokens_per_second": self.progress.tokens_per_second}
                self.accelerator.log({"train_loss": self.progress.loss, **rates}, step=taken.step)

    def _check(self, taken: TakenStep) -> float:
        """The nats of a step, if they and its gradient are finite; else go back to where it began."""
        nats, norm = taken.numbers.tolist()
        if math.isfinite(nats) and not self._has_lost_gradient(norm):
            return nats
        self._optimiser.zero_grad()
        self._walk.load_state_dict(taken.place)
        self._states = taken.states
        for later in self._taken:
            self.progress.add(later.n_targets, later.n_tokens, later.n_positions, steps=-1)
        self._taken.clear()
        self._skips.zero_()
        self.clock.steps, self.clock.targets = self.progress.step, self.progress.n_targets
        what = f"the gradient's norm is {norm}" if math.isfinite(nats) else f"the training loss is {nats}"
        raise DivergedError(what, taken.step, taken.learning_rate)

    def _has_lost_gradient(self, norm: float) -> bool:
        """Whether the gradient is not finite, and no smaller loss scale of fp16, which skips such a step, could mend it."""
        if math.isfinite(norm):
            return False
        scaler = self.accelerator.scaler
        return scaler is None or scaler.get_scale() <= LEAST_LOSS_SCALE

    def total(self, sums: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.accelerator.num_processes == 1:
            return sums  # without a wait for the device
        return self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").to(sums.device)

    def weights(self) -> dict[str, Tensor]:
        """The model's whole tensors, by the names of its own checkpoint; all processes must ask."""
        return {name: whole(tensor) for name, tensor in self.model.state_dict().items()}

    def snapshot(self) -> Snapshot:
        """All that the rest of the run depends on; all processes must ask."""
        moments = {
            f"{name}.{kind}": whole(moment)
            for name, parameter in self.model.named_parameters()
            for kind, moment in self._optimiser.optimizer.state.get(parameter, {}).items()
        }
        generators = {CPU_GENERATOR: torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            generators[CUDA_GENERATOR] = torch.cuda.get_rng_state(self.accelerator.device)
        carried = {f"{CARRIED}{name}": tensor for name, tensor in self._states.tensors().items()}
        progress = {
            "progress": self.progress.to_dict(),
            "clock": self.clock.state_dict(),
            "walk": self._walk.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        }
        return Snapshot(self.weights(), moments, {**generators, **carried}, progress)

    @torch.no_grad()
    def resume(self, snapshot: Snapshot) -> None:
        """Go on where ``snapshot`` was taken.

        Raises:
            ValueError: it is of another model or of other documents.
        """
        parameters = dict(self.model.named_parameters())
        own = self.model.state_dict()
        if own.keys() != snapshot.weights.keys():
            names = sorted(own.keys() ^ snapshot.weights.keys())
            raise ValueError(f"the checkpoint is of another model: {', '.join(names[:3])} is in only one of them")
        for name, tensor in snapshot.weights.items():
            own[name].copy_(placed_like(tensor, own[name]))
        for key, moment in snapshot.optimizer.items():
            name, _, kind = key.rpartition(".")
            parameter = parameters[name]
            placed = moment if kind == "step" else placed_like(moment, parameter)
            self._optimiser.optimizer.state[parameter][kind] = placed.to(parameter.device)
        carried = {name.removeprefix(CARRIED): t for name, t in snapshot.of_rank.items() if name.startswith(CARRIED)}
        self._states = CarriedStates.from_tensors(self.model.config, carried, self.accelerator.device)
        if self._keeps_shapes:
            self._states = self._states.of_all_rows(self._walk.batch_size)
        self._walk.load_state_dict(snapshot.progress["walk"])
        self.progress = Progress.from_dict(snapshot.progress["progress"])
        self.clock.load_state_dict(snapshot.progress["clock"])
        self.clock.steps, self.clock.targets = self.progress.step, self.progress.n_targets
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(snapshot.progress["scaler"])
        torch.set_rng_state(snapshot.of_rank[CPU_GENERATOR])
        if self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(snapshot.of_rank[CUDA_GENERATOR], self.accelerator.device)

    def _record(self, evaluation: Evaluation) -> bool:
        """Note an evaluation of the model as it is; whether it beats all before."""
        done = self.progress
        figures = {"val_loss": evaluation.loss, "val_ppl": evaluation.perplexity, **evaluation.of_pairs}
        for name, value in figures.items():
            getattr(done.history, name).append(value)
        done.history.eval_steps.append(done.step)
        self.accelerator.log(figures, step=done.step)
        if done.best and evaluation.criterion >= done.best.get("best_pair_loss", done.best["best_val_loss"]):
            done.unimproved += 1
            return False
        done.unimproved = 0
        done.best = {**{f"best_{name}": value for name, value in figures.items()}, "best_step": done.step}
        return True

    def _of_main_process(self, of_clock: float) -> float:
        """What the clock of the main process says; processes do not read the time alike."""
        mine = of_clock if self.accelerator.is_main_process else 0.0
        return float(self.total(torch.tensor(mine, dtype=torch.float64, device="cpu")))

    def _evaluation_is_due(self, progress: float) -> bool:
        if self.training.eval_steps is not None:
            return self.progress.step % self.training.eval_steps == 0
        made = len(self.progress.history.eval_steps)
        if made + 1 >= self.training.evaluations or progress < (made + 1) / self.training.evaluations:
            return False
        return bool(self._of_main_process(self.clock.has_time_to_evaluate))

    def _has_stopped_improving(self) -> bool:
        patience = self.training.early_stopping_patience
        return patience is not None and self.progress.unimproved >= patience
