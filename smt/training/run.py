"""One run from text to results: read, tokenise, train, evaluate, sample, and leave everything in a folder."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smt.data.held_out import HeldOut
from smt.data.pairs import TokenizedPairs
from smt.data.tokenized import TokenizedCorpus
from smt.data.tokenizer import TRAINED
from smt.evaluation.perplexity import Evaluation, evaluate
from smt.evaluation.preference import evaluate_pairs
from smt.model.checkpoint import CONFIG_FILE
from smt.runtime.extras import needs_extra
from smt.runtime.fields import differences
from smt.runtime.files import check_folder
from smt.runtime.process import Interrupted
from smt.runtime.progress_bar import progress_bar
from smt.training.accelerate import accelerator_of, agreed, start_trackers
from smt.training.checkpoints import Checkpoints
from smt.training.clock import Clock
from smt.training.ending import Outcome, finish, how_to_go_on, results_of, what_is_left
from smt.training.reading import read
from smt.training.run_folder import RunFolder, new_folder
from smt.training.settings import RunConfig
from smt.training.stage import Preference, Pretraining
from smt.training.starting_point import StartingPoint, fresh_model
from smt.training.trainer import DivergedError, Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

# Kept for plot and exit in a run bounded by time, beside the last evaluation (measured) and the sample.
CLOSING_SECONDS = 4.0
# Per sampled token, relative to a token in training: a forward pass of one row is small but cannot be batched.
SAMPLE_COST = 40
# An evaluation without gradients against training, per token, until one has been measured.
EVALUATION_COST = 0.5
# What a run takes from its text or its starting point, and writes down instead of what it was given.
ADOPTED = ("vocab_size", "tokenizer")


def run(config: RunConfig, out: str | Path = "results", *, started: float | None = None) -> Outcome:
    """Train and evaluate as ``config`` says in a new folder below ``out``; tell on standard output and error how it goes.

    Args:
        started: ``time.perf_counter()`` when the command began, from which its minutes count; None: now.

    Raises:
        MissingExtraError: a package of the ``train`` extra is not installed.
        ValueError: a text or pairs that cannot be read, weights to start from that do not fit, no GPU where one is asked for,
            chunks of too many kinds for graphs, or a folder that cannot be written.
        DivergedError: a loss or a gradient that is not finite; the folder has the results until then, and can be resumed.
        Interrupted: as it says; so can the folder, where the run had begun.
    """
    return _run(config.anchored(), Path(out), None, started)


def run_in(folder: str | Path, config: RunConfig, *, started: float | None = None) -> Outcome:
    """As ``run``, in exactly this folder; if the same run has been interrupted there, it goes on from its last checkpoint.

    Raises:
        ValueError: as ``run`` and ``resume``; or a run of another configuration is there.
    """
    path = Path(folder) / CONFIG_FILE
    if path.is_file():
        there, config = RunConfig.from_yaml(path).anchored(), config.anchored()
        differing = differences(there.flat(), config.flat(), but=ADOPTED)
        if differing:
            raise ValueError(f"{folder} holds another run, with {differing}")
        config = there
    return _run(config.anchored(), None, Path(folder), started)


def resume(folder: str | Path, *, started: float | None = None) -> Outcome:
    """Go on with an interrupted run from its last checkpoint: the losses are those of a run that was not interrupted.

    Raises:
        ValueError: no run is there, it has finished, another process is training it, or its held-out text has changed.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"there is no run to resume in {folder}: it has no {CONFIG_FILE}")
    return _run(RunConfig.from_yaml(path).anchored(), None, Path(folder), started)


def _run(config: RunConfig, out: Path | None, path: Path | None, started: float | None) -> Outcome:
    """A run in a new folder below ``out``, or in ``path``, where it goes on from the last checkpoint if there is one."""
    started = time.perf_counter() if started is None else started
    _check_packages()
    if path is None:
        check_folder(out / config.experiment)
    else:
        check_folder(path, "the folder of a run")
    with ExitStack() as held:
        accelerator = held.enter_context(accelerator_of(config.training))
        if path is not None:
            _lock(path, accelerator, held)
        snapshot = None if path is None else _checkpoints(path, config, accelerator).newest()
        start = StartingPoint(config.training.init_from if snapshot is None else {}, config.architecture)
        if snapshot is None:
            config = start.adopted_by(config)
            if start.tokenizer is not None:
                accelerator.print(f"tokens of the weights to start from: {config.data.tokenizer}", flush=True)
        text, pairs = read(config, None if snapshot is None else path, accelerator)
        if config.data.tokenizer in TRAINED:
            config = replace(config, model=replace(config.model, vocab_size=text.tokenizer.vocab_size))
        trainer = _trainer(config, start, text, pairs, accelerator, started)
        if snapshot is not None:
            trainer.resume(snapshot)
            accelerator.print(f"resumed in {path} after step {trainer.progress.step:,}", flush=True)
        if path is None:  # only now: a text that cannot be read leaves no folder behind
            path = Path(agreed(accelerator, lambda: str(new_folder(out, config.experiment))))
            _lock(path, accelerator, held)
        return _train_in(path, trainer, text, pairs, config, started)


def _check_packages() -> None:
    """What is missing is found before the training, not after it."""
    with needs_extra("train"):
        import accelerate  # noqa: F401
        import filelock  # noqa: F401
        import matplotlib  # noqa: F401
        import tokenizers  # noqa: F401
        import tqdm  # noqa: F401


def _checkpoints(path: Path, config: RunConfig, accelerator: Accelerator) -> Checkpoints:
    rank = {"rank": accelerator.process_index, "wait": accelerator.wait_for_everyone}
    return Checkpoints(path, limit=config.training.save_total_limit, **rank)


def _trainer(
    config: RunConfig,
    start: StartingPoint,
    text: TokenizedCorpus,
    pairs: TokenizedPairs | None,
    accelerator: Accelerator,
    started: float,
) -> Trainer:
    """The model, with the weights that it starts from, and what trains it."""
    model = fresh_model(config)
    loaded = start.load(model, match_scale=config.training.match_scale)
    if loaded is not None:
        accelerator.print(loaded, flush=True)
    if accelerator.process_index:  # the same weights on every process, but dropout of its own
        torch.manual_seed(config.training.seed + accelerator.process_index)
    compiled = config.training.compiles(accelerator.device)
    if compiled:
        model.compile(**config.training.compile_options())
    size = f"vocabulary {config.model.vocab_size:,}; {model.count_parameters()['total']:,} parameters"
    size += ", compiled" * compiled
    accelerator.print(f"{size} on {accelerator.device}", flush=True)
    clock = Clock(config.training, started, epoch_targets=(text.train if pairs is None else pairs).n_targets)
    return Trainer(model, _stage(config, text, pairs, accelerator), config.training, clock, accelerator)


def _train_in(
    path: Path, trainer: Trainer, text: TokenizedCorpus, pairs: TokenizedPairs | None, config: RunConfig, started: float
) -> Outcome:
    """Train, and leave in the folder ``path`` what comes of it, however it ends."""
    accelerator, folder = trainer.accelerator, RunFolder(path)
    checkpoints = _checkpoints(path, config, accelerator)
    try:
        if accelerator.is_main_process:
            text.tokenizer.save(path)
            folder.save_text(text)
            folder.save_config(config)  # last: what has one is a run
        start_trackers(accelerator, config, path)
        evaluation = _train(trainer, text, pairs, config, folder, checkpoints)
        outcome = finish(trainer, text, config, folder, evaluation, started)
        if outcome.is_main:
            checkpoints.finish()  # last: without results the run can still be resumed
    except DivergedError as error:
        if accelerator.is_main_process:
            folder.save_history(trainer.progress.history)
            results = results_of(trainer, trainer.evaluation, started)
            folder.save_results(config, results, accelerator.device, stopped=str(error))
        error.args = (f"{error}. {what_is_left(path, checkpoints, trainer.progress)}",)
        raise
    except KeyboardInterrupt as interrupt:
        number = interrupt.signal if isinstance(interrupt, Interrupted) else signal.SIGINT
        raise Interrupted(number, how_to_go_on(path, checkpoints)) from None
    return outcome


def _stage(
    config: RunConfig, text: TokenizedCorpus, pairs: TokenizedPairs | None, accelerator: Accelerator
) -> Pretraining | Preference:
    options = {
        "seed": config.training.seed, "rank": accelerator.process_index, "world_size": accelerator.num_processes
    }  # fmt: skip
    if pairs is None:
        return Pretraining(text.train, config.data, counted=text.train.counted, **options)
    return Preference(pairs.train, config.data, strength=config.training.orpo_lambda, **options)


def _lock(path: Path, accelerator: Accelerator, held: ExitStack) -> None:
    """Make the folder of a run and keep others from training there until ``held`` is left; one process does it for all."""

    def lock() -> str | None:
        folder = RunFolder(path)
        path.mkdir(parents=True, exist_ok=True)
        try:
            folder.lock()
        except ValueError as error:
            return str(error)
        held.callback(folder.unlock)
        return f"the run in {path} has finished: there is nothing to resume" if folder.is_finished else None

    refused = agreed(accelerator, lock)
    if refused is not None:
        raise ValueError(refused)


def _train(
    trainer: Trainer,
    text: TokenizedCorpus,
    pairs: TokenizedPairs | None,
    config: RunConfig,
    folder: RunFolder,
    checkpoints: Checkpoints,
) -> Evaluation:
    accelerator, clock, done = trainer.accelerator, trainer.clock, trainer.progress
    evaluation_seconds: float | None = None
    held_out = HeldOut.of(text.validation, config.data.eval_documents)
    n_steps = held_out.n_steps
    bar = progress_bar(sys.stderr if accelerator.is_main_process else None, clock.progress)

    def on_step() -> None:
        per_token = done.seconds_per_token
        measured = evaluation_seconds
        expected = EVALUATION_COST * per_token * n_steps if measured is None else measured
        clock.evaluation = 1.1 * expected
        clock.reserve = clock.evaluation + SAMPLE_COST * per_token * config.training.sample_tokens + CLOSING_SECONDS
        bar.update(clock.progress, f"step {done.step}, loss {done.loss:.3f}, {done.tokens_per_second:,.0f} tokens/s")

    def evaluated() -> Evaluation:
        nonlocal evaluation_seconds
        started = time.perf_counter()
        sizes = {"batch_size": config.data.eval_batch_size, "length": config.data.eval_chunk_length}
        ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        evaluation = evaluate(trainer.objective, held_out.walk(**sizes, **ranks), held_out.n_bytes, total=trainer.total)
        told = f"step {done.step}: held-out loss {evaluation.loss:.4f}, {evaluation.bits_per_byte:.3f} bits per byte"
        if pairs is not None:
            options = {"batch_size": config.data.eval_batch_size, "strength": config.training.orpo_lambda}
            of_pairs = evaluate_pairs(trainer.objective, pairs.held_out, **options)
            evaluation = replace(evaluation, pairs=of_pairs)
            told += f"; pairs: loss {of_pairs.loss:.4f}, accuracy {of_pairs.accuracy:.1%}, margin {of_pairs.margin:.3f}"
        evaluation_seconds = time.perf_counter() - started
        if accelerator.is_main_process:
            bar.write(told)
        return evaluation

    def evaluated_uncompiled() -> Evaluation:
        with config.training.uncompiled(accelerator.device):
            return evaluated()

    def save_best() -> None:
        weights = trainer.weights()
        if accelerator.is_main_process:
            folder.save_weights(weights)

    def save_checkpoint() -> None:
        checkpoints.save(done.step, trainer.snapshot())
        if accelerator.is_main_process:
            folder.save_history(done.history)

    with closing(bar):
        return trainer.train(evaluated_uncompiled, on_step=on_step, on_best=save_best, on_checkpoint=save_checkpoint)
