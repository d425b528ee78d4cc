"""One run from text to results: read, tokenise, train, evaluate, sample, and leave everything in a folder."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smt.baselines import FullAttentionGPT2
from smt.data.tokenized import TokenizedCorpus, tokenize_corpus
from smt.data.tokenizer import TRAINED, Tokenizer
from smt.data.walk import DocumentWalk
from smt.evaluation.perplexity import Evaluation, evaluate
from smt.model.checkpoint import CONFIG_FILE
from smt.model.transformer import StrideMemoryTransformer
from smt.runtime.extras import needs_extra
from smt.training.accelerate import agreed, make_accelerator, start_trackers
from smt.training.checkpoints import Checkpoints
from smt.training.clock import Clock
from smt.training.plots import training_curves
from smt.training.progress import Progress
from smt.training.run_folder import RunFolder, new_folder
from smt.training.settings import RunConfig
from smt.training.sharding import is_sharded
from smt.training.starting_point import StartingPoint
from smt.training.trainer import Trainer

if TYPE_CHECKING:
    import numpy as np

# Kept for plot and exit in a run bounded by time, beside the last evaluation (measured) and the sample.
CLOSING_SECONDS = 4.0
# Per sampled token, relative to a token in training: a forward pass of one row is small but cannot be batched.
SAMPLE_COST = 40
SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 0.8, 0.95
# An evaluation without gradients against training, per token, until one has been measured.
EVALUATION_COST = 0.5
# What a run takes from its text or its starting point, and writes down in the stead of what it was given.
ADOPTED = ("vocab_size", "tokenizer")


@dataclass(frozen=True)
class Outcome:
    """What a run ends with.

    Attributes:
        config: exactly what ran.
        folder: where its files are.
        evaluation: of the final weights, on the held-out documents, or those that ``data.eval_documents`` leaves.
        progress: what the training loop did.
        sample: prompt and continuation; empty on all processes but the first.
        results: what ``results.json`` records.
        is_main: whether this is the process that reports.
    """

    config: RunConfig
    folder: Path
    evaluation: Evaluation
    progress: Progress
    sample: tuple[str, str]
    results: dict[str, Any]
    is_main: bool = True


def run(config: RunConfig, out: str | Path = "results", *, started: float | None = None) -> Outcome:
    """Train and evaluate as ``config`` says in a new folder below ``out``; tell on standard output and error how it goes.

    Args:
        started: ``time.perf_counter()`` when the command began, from which its minutes count; None: now.

    Raises:
        MissingExtraError: a package of the ``train`` extra is not installed.
        ValueError: a text that cannot be read, weights to start from that do not fit, or no GPU where one is asked for.
    """
    return _run(config, Path(out), None, started)


def run_in(folder: str | Path, config: RunConfig, *, started: float | None = None) -> Outcome:
    """As ``run``, in exactly this folder; if the same run has been interrupted there, it goes on from its last checkpoint.

    Raises:
        ValueError: as ``run``; or a run of another configuration is there, or one that has finished.
    """
    path = Path(folder) / CONFIG_FILE
    if path.is_file():
        there = RunConfig.from_yaml(path)
        theirs, ours = there.flat(), config.flat()
        differing = [name for name in ours if theirs[name] != ours[name] and name not in ADOPTED]
        if differing:
            values = ", ".join(f"{name} = {theirs[name]!r}, not {ours[name]!r}" for name in differing)
            raise ValueError(f"{folder} holds another run, with {values}")
        config = there
    return _run(config, None, Path(folder), started)


def resume(folder: str | Path, *, started: float | None = None) -> Outcome:
    """Go on with an interrupted run from its last checkpoint: the losses are those of a run that was not interrupted.

    Raises:
        ValueError: no run is there, or it has finished.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"there is no run to resume in {folder}: it has no {CONFIG_FILE}")
    return _run(RunConfig.from_yaml(path), None, Path(folder), started)


def _run(config: RunConfig, out: Path | None, path: Path | None, started: float | None) -> Outcome:
    started = time.perf_counter() if started is None else started
    with needs_extra("train"):
        import accelerate  # noqa: F401 - what is missing is found before the training, not after it
        import matplotlib  # noqa: F401
        import tokenizers  # noqa: F401
        import tqdm  # noqa: F401
    accelerator = make_accelerator(config.training)
    say = accelerator.print
    if path is not None and RunFolder(path).is_finished:
        raise ValueError(f"the run in {path} has finished: there is nothing to resume")
    rank = {"rank": accelerator.process_index, "wait": accelerator.wait_for_everyone}
    limit = config.training.save_total_limit
    snapshot = None if path is None else Checkpoints(path, limit=limit, **rank).newest()
    start = StartingPoint(config.training.init_from if snapshot is None else {})
    if snapshot is None:
        config = start.adopted_by(config)
        if start.tokenizer is not None:
            say(f"tokens of the weights to start from: {config.data.tokenizer}", flush=True)
    # The tokens of a run that goes on are those that it has saved.
    data = config.data if snapshot is None else replace(config.data, tokenizer=str(path))
    with accelerator.main_process_first():
        text = tokenize_corpus(data, config.model.vocab_size)
    say(text.describe(), flush=True)
    rows = config.data.batch_size * accelerator.num_processes
    for warning in (text.warning(config.model.window_size), text.idle_rows(rows, config.data.part_length)):
        if warning and accelerator.is_main_process:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    if config.data.tokenizer in TRAINED:
        config = replace(config, model=replace(config.model, vocab_size=text.tokenizer.vocab_size))
    model = _model(config)
    loaded = start.load(model, match_scale=config.training.match_scale)
    if loaded is not None:
        say(loaded, flush=True)
    if accelerator.process_index:  # the same weights on every process, but dropout of its own
        torch.manual_seed(config.training.seed + accelerator.process_index)
    size = f"vocabulary {config.model.vocab_size:,}; {model.count_parameters()['total']:,} parameters"
    say(f"{size} on {accelerator.device}", flush=True)

    clock = Clock(config.training, started, epoch_targets=text.train.n_targets)
    trainer = Trainer(model, text.train, config.data, config.training, clock, accelerator, counted=text.train.counted)
    if snapshot is not None:
        trainer.resume(snapshot)
        say(f"resumed in {path} after step {trainer.progress.step:,}", flush=True)
    if path is None:  # only now: a text that cannot be read leaves no folder behind
        path = Path(agreed(accelerator, lambda: str(new_folder(out, config.experiment))))
    folder, checkpoints = RunFolder(path), Checkpoints(path, limit=limit, **rank)
    if accelerator.is_main_process:
        path.mkdir(parents=True, exist_ok=True)
        text.tokenizer.save(path)
        folder.save_config(config)
    start_trackers(accelerator, config, path)
    evaluation = _train(trainer, text, config, folder, checkpoints)
    outcome = _finish(trainer, text, config, folder, evaluation, started)
    if outcome.is_main:
        checkpoints.finish()  # last: without results the run can still be resumed
    accelerator.end_training()
    return outcome


def _finish(
    trainer: Trainer, text: TokenizedCorpus, config: RunConfig, folder: RunFolder, evaluation: Evaluation, started: float
) -> Outcome:
    """Sample, plot and write the results, on the first process; all processes must come here."""
    accelerator, progress, weights, sample = trainer.accelerator, trainer.progress, trainer.weights(), ("", "")
    if accelerator.is_main_process:
        model = trainer.model
        if is_sharded(model):
            model = _model(config)
            model.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()})
        sample = _sample(model, text.validation[0], config, text.tokenizer)
        curves = f"{config.experiment}: {evaluation.bits_per_byte:.3f} bits per byte"
        training_curves(progress.history, folder.curves, title=curves)
    results = {
        **progress.best,
        "final_val_loss": evaluation.loss,
        "final_val_ppl": evaluation.perplexity,
        "val_bits_per_byte": evaluation.bits_per_byte,
        "val_tokens": evaluation.n_targets,
        "val_bytes": evaluation.n_bytes,
        "parameters": trainer.model.count_parameters()["total"],
        "steps": progress.step,
        "train_tokens": progress.n_tokens,
        "padding": progress.padding,
        "tokens_per_second": progress.tokens_per_second,
        "training_seconds": progress.seconds,
        "seconds": time.perf_counter() - started,
    }
    if accelerator.is_main_process:
        folder.save_results(config, results, accelerator.device)
    return Outcome(config, folder.path, evaluation, progress, sample, results, accelerator.is_main_process)


def _model(config: RunConfig) -> StrideMemoryTransformer | FullAttentionGPT2:
    """A fresh model, the same on every process."""
    torch.manual_seed(config.training.seed)
    if config.architecture == "gpt2":
        model = FullAttentionGPT2(config.model, config.data.chunk_length)
    else:
        model = StrideMemoryTransformer(config.model)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _train(
    trainer: Trainer, text: TokenizedCorpus, config: RunConfig, folder: RunFolder, checkpoints: Checkpoints
) -> Evaluation:
    from tqdm import tqdm

    accelerator, clock, done = trainer.accelerator, trainer.clock, trainer.progress
    evaluation_seconds: float | None = None
    bound = config.data.eval_documents  # None: all
    held_out = [text.validation[index] for index in range(len(text.validation))[:bound]]
    counted = text.validation.counted and text.validation.counted[:bound]
    n_targets, n_bytes = sum(len(document) - 1 for document in held_out), sum(text.validation.n_bytes[:bound])
    # In hundredths of a run, since a run may be bounded by time.
    style = {
        "bar_format": "{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}{postfix}",
        "initial": min(100.0, 100 * clock.progress),
    }
    bar = tqdm(total=100, file=sys.stderr, disable=not accelerator.is_main_process, **style)

    def on_step() -> None:
        per_token = done.seconds_per_token
        measured = evaluation_seconds
        expected = EVALUATION_COST * per_token * n_targets if measured is None else measured
        clock.reserve = 1.1 * expected + SAMPLE_COST * per_token * config.training.sample_tokens + CLOSING_SECONDS
        bar.set_postfix_str(f"step {done.step}, loss {done.loss:.3f}, {done.tokens_per_second:,.0f} tokens/s", refresh=False)
        bar.update(min(100.0, 100 * clock.progress) - bar.n)

    def evaluated() -> Evaluation:
        nonlocal evaluation_seconds
        started = time.perf_counter()
        sizes = {"batch_size": config.data.eval_batch_size, "length": config.data.eval_chunk_length}
        ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        batches = DocumentWalk(held_out, counted=counted, **sizes, **ranks, epochs=1, shuffle=False, together=True)
        evaluation = evaluate(trainer.objective, batches, n_bytes, total=trainer.total)
        evaluation_seconds = time.perf_counter() - started
        if accelerator.is_main_process:
            bar.write(f"step {done.step}: held-out loss {evaluation.loss:.4f}, {evaluation.bits_per_byte:.3f} bits per byte")
        return evaluation

    def save_best() -> None:
        weights = trainer.weights()
        if accelerator.is_main_process:
            folder.save_weights(weights)

    def save_checkpoint() -> None:
        checkpoints.save(done.step, trainer.snapshot())
        if accelerator.is_main_process:
            folder.save_history(done.history)

    with bar:
        return trainer.train(evaluated, on_step=on_step, on_best=save_best, on_checkpoint=save_checkpoint)


def _sample(model: torch.nn.Module, document: np.ndarray, config: RunConfig, tokenizer: Tokenizer) -> tuple[str, str]:
    """The beginning of a held-out document, and how the model goes on."""
    device = model.embedding.weight.device
    prompt = torch.tensor(document[: config.model.m_input_tokens].tolist(), device=device)
    generator = torch.Generator(device).manual_seed(config.training.seed)
    (tokens,) = model.generate(
        prompt[None], config.training.sample_tokens, temperature=SAMPLE_TEMPERATURE, top_p=SAMPLE_TOP_P, generator=generator
    )
    read, drawn = prompt[1:].cpu(), tokens[len(prompt) :].cpu()
    return tokenizer.decode(read), tokenizer.decode(drawn, after=read)
