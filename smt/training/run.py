"""One run from text to results: read, tokenise, train, evaluate, sample, and leave everything in a folder."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smt.data.tokenized import TokenizedCorpus, tokenize_corpus
from smt.data.tokenizer import TRAINED, Tokenizer
from smt.data.walk import DocumentWalk
from smt.device import find_device
from smt.evaluation.perplexity import Evaluation, evaluate
from smt.extras import needs_extra
from smt.model import StrideMemoryTransformer
from smt.plots import training_curves
from smt.precision import precision
from smt.training.clock import Clock
from smt.training.loop import Progress, train
from smt.training.run_folder import RunFolder
from smt.training.settings import RunConfig
from smt.training.starting_point import StartingPoint

if TYPE_CHECKING:
    import numpy as np

# Kept for plot and exit in a run bounded by time, beside the last evaluation (measured) and the sample.
CLOSING_SECONDS = 4.0
# Per sampled token, relative to a token in training: a forward pass of one row is small but cannot be batched.
SAMPLE_COST = 40
SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 0.8, 0.95
# An evaluation without gradients against training, per token, until one has been measured.
EVALUATION_COST = 0.5


@dataclass(frozen=True)
class Outcome:
    """What a run ends with.

    Attributes:
        config: exactly what ran.
        folder: where its files are.
        evaluation: of the final weights, on the held-out documents, or those that ``data.eval_documents`` leaves.
        progress: what the training loop did.
        sample: prompt and continuation.
        results: what ``results.json`` records.
    """

    config: RunConfig
    folder: Path
    evaluation: Evaluation
    progress: Progress
    sample: tuple[str, str]
    results: dict[str, Any]


def run(config: RunConfig, out: str | Path = "results", *, started: float | None = None) -> Outcome:
    """Train and evaluate as ``config`` says; tell on standard output and standard error how it goes.

    Args:
        out: the folder below which the run's folder is made.
        started: ``time.perf_counter()`` when the command began, from which its minutes count; None: now.

    Raises:
        MissingExtraError: a package of the ``train`` extra is not installed.
        ValueError: a text that cannot be read, weights to start from that do not fit, or no GPU where one is asked for.
    """
    started = time.perf_counter() if started is None else started
    with needs_extra("train"):
        import matplotlib  # noqa: F401 - what is missing is found before the training, not after it
        import tokenizers  # noqa: F401
        import tqdm  # noqa: F401
    device = find_device(config.training.device)
    start = StartingPoint(config.training.init_from)
    config = start.adopted_by(config)
    if start.tokenizer is not None:
        print(f"tokens of the weights to start from: {config.data.tokenizer}", flush=True)
    text = tokenize_corpus(config.data, config.model.vocab_size)
    print(text.describe(), flush=True)
    if warning := text.warning(config.model.window_size):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if config.data.tokenizer in TRAINED:
        config = replace(config, model=replace(config.model, vocab_size=text.tokenizer.vocab_size))
    torch.manual_seed(config.training.seed)
    model = StrideMemoryTransformer(config.model)
    loaded = start.load(model, match_scale=config.training.match_scale)
    if loaded is not None:
        print(loaded, flush=True)
    model.to(device)
    print(
        f"vocabulary {config.model.vocab_size:,}; {model.count_parameters()['total']:,} parameters on {device}",
        flush=True,
    )
    folder = RunFolder(out, config)
    text.tokenizer.save(folder.path)

    progress, evaluation, best = _train(model, text, config, folder, Clock(config.training, started))
    sample = _sample(model, text.validation[0], config, text.tokenizer)
    results = {
        **best,
        "final_val_loss": evaluation.loss,
        "final_val_ppl": evaluation.perplexity,
        "val_bits_per_byte": evaluation.bits_per_byte,
        "val_tokens": evaluation.n_targets,
        "val_bytes": evaluation.n_bytes,
        "steps": progress.step,
        "train_tokens": progress.n_tokens,
        "padding": progress.padding,
        "tokens_per_second": progress.tokens_per_second,
        "seconds": time.perf_counter() - started,
    }
    folder.save_results(config, results, device)
    training_curves(progress.history, folder.curves, title=f"{config.experiment}: {evaluation.bits_per_byte:.3f} bits per byte")
    return Outcome(config, folder.path, evaluation, progress, sample, results)


def _train(
    model: StrideMemoryTransformer, text: TokenizedCorpus, config: RunConfig, folder: RunFolder, clock: Clock
) -> tuple[Progress, Evaluation, dict[str, Any]]:
    from tqdm import tqdm

    best: dict[str, Any] = {"best_val_loss": float("inf")}
    latest: list[Evaluation] = []
    evaluation_seconds: float | None = None
    bound = config.data.eval_documents  # None: all
    held_out = [text.validation[index] for index in range(len(text.validation))[:bound]]
    counted = text.validation.counted and text.validation.counted[:bound]
    n_targets, n_bytes = sum(len(document) - 1 for document in held_out), sum(text.validation.n_bytes[:bound])
    # In hundredths of a run, since a run may be bounded by time.
    bar = tqdm(total=100, file=sys.stderr, bar_format="{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}{postfix}")

    def on_step(done: Progress) -> None:
        per_token = done.seconds_per_token
        measured = evaluation_seconds
        expected = EVALUATION_COST * per_token * n_targets if measured is None else measured
        clock.reserve = 1.1 * expected + SAMPLE_COST * per_token * config.training.sample_tokens + CLOSING_SECONDS
        bar.set_postfix_str(f"step {done.step}, loss {done.loss:.3f}, {done.tokens_per_second:,.0f} tokens/s", refresh=False)
        bar.update(min(100.0, 100 * clock.progress) - bar.n)

    def on_evaluation(done: Progress) -> Evaluation:
        nonlocal evaluation_seconds
        started = time.perf_counter()
        sizes = {"batch_size": config.data.eval_batch_size, "length": config.data.eval_chunk_length}
        batches = DocumentWalk(held_out, counted=counted, **sizes, epochs=1, shuffle=False, together=True)
        evaluation = evaluate(model, batches, n_bytes)
        evaluation_seconds = time.perf_counter() - started
        latest[:] = [evaluation]
        bar.write(f"step {done.step}: held-out loss {evaluation.loss:.4f}, {evaluation.bits_per_byte:.3f} bits per byte")
        if evaluation.loss < best["best_val_loss"]:
            best.update(best_val_loss=evaluation.loss, best_val_ppl=evaluation.perplexity, best_step=done.step)
            folder.save_weights(model)
        return evaluation

    with bar:
        calls = {"on_step": on_step, "on_evaluation": on_evaluation}
        progress = train(model, text.train, config.data, config.training, clock, counted=text.train.counted, **calls)
    folder.save_history(progress.history)
    return progress, latest[0], best


def _sample(model: StrideMemoryTransformer, document: np.ndarray, config: RunConfig, tokenizer: Tokenizer) -> tuple[str, str]:
    """The beginning of a held-out document, and how the model goes on."""
    device = model.embedding.weight.device
    prompt = torch.tensor(document[: config.model.m_input_tokens].tolist(), device=device)
    generator = torch.Generator(device).manual_seed(config.training.seed)
    with precision(device):
        (tokens,) = model.generate(
            prompt[None], config.training.sample_tokens, temperature=SAMPLE_TEMPERATURE, top_p=SAMPLE_TOP_P, generator=generator
        )
    return tokenizer.decode(prompt[1:].cpu()), tokenizer.decode(tokens[len(prompt) :].cpu())
