"""What a run ends with: results, then a sample and a plot; or, where it does not come to its end, how it goes on."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smt.baselines import RunModel
from smt.config import SMTConfig
from smt.data.tokenized import TokenizedCorpus
from smt.evaluation.perplexity import Evaluation
from smt.runtime.extras import optional
from smt.runtime.files import write_files
from smt.training.checkpoints import Checkpoints
from smt.training.plots import training_curves
from smt.training.progress import Progress
from smt.training.run_folder import RunFolder
from smt.training.sample import continuation
from smt.training.settings import RunConfig
from smt.training.sharding import is_sharded
from smt.training.starting_point import fresh_model
from smt.training.trainer import Trainer


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


def finish(
    trainer: Trainer, text: TokenizedCorpus, config: RunConfig, folder: RunFolder, evaluation: Evaluation, started: float
) -> Outcome:
    """Write the results, then sample and plot, on the first process; all processes must come here."""
    accelerator, progress, weights, sample = trainer.accelerator, trainer.progress, trainer.weights(), ("", "")
    results = results_of(trainer, evaluation, started)
    if accelerator.is_main_process:
        folder.save_results(config, results, accelerator.device)
        with optional("sample"):
            model = trainer.model
            if is_sharded(model):
                model = fresh_model(config)
                model.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()})
            sample = _sample(model, text, config)
        with optional(folder.curves.name):
            title = f"{config.experiment}: {evaluation.bits_per_byte:.3f} bits per byte"
            write_files({folder.curves: lambda path: training_curves(progress.history, path, title=title)})
    return Outcome(config, folder.path, evaluation, progress, sample, results, accelerator.is_main_process)


def results_of(trainer: Trainer, evaluation: Evaluation | None, started: float) -> dict[str, Any]:
    """What ``results.json`` records; of an evaluation that there was not, None."""
    progress = trainer.progress
    return {
        **progress.best,
        "final_val_loss": evaluation and evaluation.loss,
        "final_val_ppl": evaluation and evaluation.perplexity,
        "val_bits_per_byte": evaluation and evaluation.bits_per_byte,
        "val_tokens": evaluation and evaluation.n_targets,
        "val_bytes": evaluation and evaluation.n_bytes,
        **({} if evaluation is None else {f"final_{name}": value for name, value in evaluation.of_pairs.items()}),
        "parameters": trainer.model.count_parameters()["total"],
        "steps": progress.step,
        "train_tokens": progress.n_tokens,
        "padding": progress.padding,
        "tokens_per_second": progress.tokens_per_second,
        "training_seconds": progress.seconds,
        "seconds": time.perf_counter() - started,
    }


def how_to_go_on(path: Path, checkpoints: Checkpoints) -> str:
    """Of a run that was interrupted."""
    step = checkpoints.newest_step
    where = "begins anew there" if step is None else f"goes on from step {step:,}"
    return f"the run is in {path}: smt train --resume {shlex.quote(str(path))} {where}"


def what_is_left(path: Path, checkpoints: Checkpoints, progress: Progress) -> str:
    """Of a run that has diverged."""
    if not progress.best:
        return f"No weights of the run in {path} had a finite held-out loss. A lower learning rate may help"
    step = checkpoints.newest_step
    checkpoint = "" if step is None else f"a checkpoint of step {step:,}, "
    best = f"the weights of step {progress.best['best_step']:,} with a held-out loss of {progress.best['best_val_loss']:.4f}"
    return (
        f"{path} has {checkpoint}{best}, and the results until then. A lower learning rate may help; "
        f"smt train --resume {shlex.quote(str(path))} goes on with the same"
    )


def _sample(model: RunModel, text: TokenizedCorpus, config: RunConfig) -> tuple[str, str]:
    """The beginning of a held-out document, and how the model goes on."""
    of_model = config.model
    length = of_model.m_input_tokens if isinstance(of_model, SMTConfig) else max(1, config.data.chunk_length // 4)
    with config.training.uncompiled(model.embedding.weight.device):
        prompt, n_tokens = text.validation[0][:length], config.training.sample_tokens
        return continuation(model, prompt, n_tokens, text.tokenizer, config.training.seed)
