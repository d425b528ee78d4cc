"""Which learning rate suits each model of a study: stage 1 at each, with seeds that are not compared; ``main`` runs one.

    <study>/learning_rates/<model>,learning_rate=<rate>,seed=<seed>/cell.yaml, training/, training.json

What is there already is not run again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from smt.data.tokenized import tokenize_corpus
from smt.experiments import cell as any_cell
from smt.experiments.run import attempt_apart, cores
from smt.runtime.device import find_device
from smt.runtime.files import read_json, read_yaml
from smt.runtime.process import keep_freed_memory
from smt.study.cell import CELL_FILE, TRAINING, as_yaml, ask, check_same, load, losses_of, measured_file, save_measured
from smt.study.prepared import Prepared
from smt.study.settings import CARRIED
from smt.training.run import run_in
from smt.training.run_files import has_finished
from smt.training.settings import RunConfig

TRIAL_MODULE = "smt.study.rates"
FOLDER = "learning_rates"


def main(folder: str) -> int:
    """``smt.experiments.cell.main`` for such a run."""
    keep_freed_memory()
    return any_cell.main(folder, work)


def work(folder: Path) -> None:
    """Train, and measure the held-out loss."""
    config = RunConfig.from_dict(read_yaml(folder / CELL_FILE))
    run = folder / TRAINING
    if not has_finished(run):
        run_in(run, config)
    text = tokenize_corpus(config.data, config.model.vocab_size)
    save_measured(folder, TRAINING, losses_of(load(run, config), config.data, text, run))


def chosen_rates(prepared: Prepared, tell: Callable[[str], None]) -> dict[str, float]:
    """Of each model, the rate of ``learning_rates`` with the lowest mean loss; nothing where the study tries none.

    Speed is no matter here, so on a CPU as many runs go on at once as there are cores. A rate at which training fails is
    none to choose.

    Raises:
        ValueError: a folder holds a run of another study, or every rate of a model has failed.
    """
    wanted = {folder: as_yaml(run.to_dict()) for folder, run in _trials(prepared).items()}
    for folder in wanted:
        check_same(folder, wanted[folder])
    waiting = [folder for folder in wanted if not measured_file(folder, TRAINING).is_file()]
    for folder in waiting:
        ask(folder, wanted[folder])
    if waiting:
        tell(f"{len(waiting)} of {len(wanted)} runs to choose learning rates by begin in {prepared.folder / FOLDER}")
    device = find_device(prepared.first_stage.training.device)
    jobs = cores() if device.type == "cpu" else 1
    for folder, error in attempt_apart(waiting, jobs, TRIAL_MODULE):
        tell(f"{folder.name}: " + ("finished" if error is None else f"failed: {error}"))
    chosen = {}
    for model, losses in tried_rates(prepared).items():
        if not losses:
            raise ValueError(f"no learning rate of {model} came to an end in {prepared.folder / FOLDER}")
        chosen[model] = min(losses, key=losses.__getitem__)
    return chosen


def tried_rates(prepared: Prepared) -> dict[str, dict[float, float]]:
    """Of each model, mean held-out losses by learning rate, where all runs have come to an end; nothing where none are tried.

    As a model is trained, it is read: ``smt_carried`` with its memory carried, all others with every piece read anew.
    """
    settings = prepared.settings
    if not settings.learning_rates:
        return {}
    tried: dict[str, dict[float, float]] = {model: {} for model in settings.models}
    for model in settings.models:
        for rate in settings.learning_rates:
            paths = [measured_file(_folder(prepared, model, rate, seed), TRAINING) for seed in settings.learning_rate_seeds]
            if all(path.is_file() for path in paths):
                losses = [read_json(path)["carried" if model == CARRIED else "held_out"]["loss"] for path in paths]
                tried[model][rate] = statistics.fmean(losses)
    return tried


def _trials(prepared: Prepared) -> dict[Path, RunConfig]:
    settings = prepared.settings
    return {
        _folder(prepared, model, rate, seed): prepared.training_of(model, seed, rate)
        for seed in settings.learning_rate_seeds
        for model in settings.models
        for rate in settings.learning_rates
    }


def _folder(prepared: Prepared, model: str, rate: float, seed: int) -> Path:
    return prepared.folder / FOLDER / f"{model},learning_rate={rate:g},seed={seed}"
