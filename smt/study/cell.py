"""One cell of a study: a model with a seed, through both stages; ``main`` does it in a process of its own.

    <cell>/cell.yaml                            what is to be done
           training/, equal_time/, orpo/        runs, each a folder as smt train leaves it
           pairs.jsonl, held_out_pairs.jsonl    made by the model of stage 1
           training.json, ...                   what was measured after each run

What is there already is not done again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from smt.baselines import RunModel, build
from smt.data.settings import DataConfig
from smt.data.tokenized import TokenizedCorpus, tokenize_corpus
from smt.evaluation.perplexity import Evaluation
from smt.experiments import cell as any_cell
from smt.experiments.cell import CELL_FILE, FAILURE_FILE
from smt.model.checkpoint import CONFIG_FILE, load_weights
from smt.model.transformer import StrideMemoryTransformer
from smt.runtime.device import find_device
from smt.runtime.files import finite, read_json, read_yaml, text_writer, write_files
from smt.runtime.process import keep_freed_memory
from smt.study.measure import decoding_speeds, held_out_loss, kept_bytes, peak_bytes
from smt.study.preference import HELD_OUT_FILE, PAIRS_FILE, make_pairs, preferences, second_stage
from smt.training.objective import ChunkLoss
from smt.training.run import run_in
from smt.training.run_files import RESULTS_FILE, has_finished
from smt.training.sample import continuation
from smt.training.settings import RunConfig

TRAINING, EQUAL_TIME, ORPO = "training", "equal_time", "orpo"
# Set when all models have been trained for as many tokens, so it tells no two studies apart.
EQUAL_TIME_STEPS = "equal_time_steps"
# What a run says of the machine, which is the same in both stages.
OF_THE_MACHINE = ("device", "compile", "mixed_precision")


def main(folder: str) -> int:
    """``smt.experiments.cell.main`` for such a cell."""
    keep_freed_memory()
    return any_cell.main(folder, work)


def work(folder: Path) -> None:
    """Do what is not there yet."""
    wanted = read_yaml(folder / CELL_FILE)
    first = RunConfig.from_dict(wanted["run"])
    text = tokenize_corpus(first.data, first.model.vocab_size)
    _stage(folder, TRAINING, first, text, wanted)
    if wanted[EQUAL_TIME_STEPS] is not None:
        as_long = {**wanted["run"]["training"], "steps": wanted[EQUAL_TIME_STEPS]}
        _stage(folder, EQUAL_TIME, RunConfig.from_dict({**wanted["run"], "training": as_long}), text, wanted)
    if not measured_file(folder, ORPO).is_file():
        seed = first.training.seed
        make_pairs(folder, load(folder / TRAINING, first), text, wanted["pairs"], seed)
        fields = {**{name: getattr(first.training, name) for name in OF_THE_MACHINE}, **wanted["orpo"]}
        second = second_stage(folder / TRAINING, folder / PAIRS_FILE, seed, fields)
        _stage(folder, ORPO, second, text, wanted)


def as_yaml(wanted: dict[str, Any]) -> dict[str, Any]:
    """What a process is to do, as a file holds it: tuples are lists there."""
    return yaml.safe_load(yaml.safe_dump(wanted))


def asked_before(folder: Path) -> dict[str, Any]:
    """What the process of a cell was to do before; nothing where there was none."""
    path = folder / CELL_FILE
    return read_yaml(path) if path.is_file() else {}


def check_same(folder: Path, wanted: dict[str, Any]) -> None:
    """Raise ValueError if a cell of another study is in the folder."""
    there = asked_before(folder)
    if not there:
        return
    differing = [name for name in wanted if name != EQUAL_TIME_STEPS and there.get(name) != wanted[name]]
    if differing:
        raise ValueError(
            f"{folder} is of another study, with other {', '.join(differing)}; give this one another --out or name, or remove "
            "that folder"
        )


def ask(folder: Path, wanted: dict[str, Any]) -> None:
    """Write down what the process of a cell is to do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    write_files({folder / CELL_FILE: text_writer(yaml.safe_dump(wanted, sort_keys=False))})


def save_measured(folder: Path, stage: str, measured: dict[str, Any]) -> None:
    """Write down what was measured after a stage."""
    content = json.dumps(finite(measured), indent=2, allow_nan=False) + "\n"
    write_files({measured_file(folder, stage): text_writer(content)})


def measured_file(folder: Path, stage: str) -> Path:
    """What was measured after a stage."""
    return folder / f"{stage}.json"


def is_done(folder: Path, *, equal_time: bool) -> bool:
    """Whether nothing is left to do in a cell; ``equal_time``: with that run, too."""
    return all(measured_file(folder, stage).is_file() for stage in (TRAINING, ORPO, *[EQUAL_TIME] * equal_time))


def load(run: Path, config: RunConfig) -> RunModel:
    """The model of a finished run of ``config``, for evaluation, on its device."""
    there = RunConfig.from_yaml(run / CONFIG_FILE)  # whose vocabulary may be smaller
    model = build(there.architecture, there.model, there.data.chunk_length)
    load_weights(model, run)
    return model.to(find_device(config.training.device)).eval()


def _stage(folder: Path, stage: str, config: RunConfig, text: TokenizedCorpus, wanted: dict[str, Any]) -> None:
    """Run it and measure it."""
    if measured_file(folder, stage).is_file():
        return
    run, device, data = folder / stage, find_device(config.training.device), config.data
    peak = None
    if not has_finished(run):
        run_in(run, config)
        peak = peak_bytes(device) if stage == TRAINING else None  # what came before is in it
    model = load(run, config)
    measured = {"peak_bytes": peak, **losses_of(model, data, text, run)}
    if stage != EQUAL_TIME:
        prompt = torch.from_numpy(text.validation[0][: wanted["context"]].astype("int64")).to(device)
        beginning = text.validation[0][: wanted["pairs"]["prompt_length"]]
        sample = continuation(model, beginning, wanted["sample_tokens"], text.tokenizer, config.training.seed)
        measured["sample"] = dict(zip(("prompt", "continuation"), sample, strict=True))
        measured["preference"] = None
        if stage == TRAINING:
            measured["decoding"] = decoding_speeds(model, prompt, wanted["decode_tokens"])
            measured["kept"] = kept_bytes(model, prompt)
        else:
            of_pairs = {"length": config.data.chunk_length, "batch_size": config.data.eval_batch_size}
            of_pairs["strength"] = config.training.orpo_lambda
            measured["preference"] = {
                when: preferences(each, text.tokenizer, folder / HELD_OUT_FILE, **of_pairs)
                for when, each in (("before", load(folder / TRAINING, config)), ("after", model))
            }
    save_measured(folder, stage, measured)


def losses_of(model: RunModel, data: DataConfig, text: TokenizedCorpus, run: Path) -> dict[str, Any]:
    """The held-out loss of the weights that the run in a folder has kept, with every piece of text read anew.

    A Hymba is evaluated so in its run; ours there carries its memory through whole documents.
    """
    results = read_json(run / RESULTS_FILE)["results"]
    n_targets, n_bytes = results["val_tokens"], results["val_bytes"]
    of_run = Evaluation(results["best_val_loss"] * n_targets, n_targets, n_bytes)
    carries = isinstance(model, StrideMemoryTransformer)
    anew = held_out_loss(ChunkLoss(model), text.validation, data) if carries else of_run
    told = ("steps", "train_tokens", "training_seconds", "tokens_per_second", "parameters")
    return {
        **{name: results[name] for name in told},
        "held_out": _figures(anew),
        "carried": _figures(of_run) if carries else None,
    }


def _figures(evaluation: Evaluation) -> dict[str, float]:
    there = asdict(evaluation)
    counted = {name: there[name] for name in ("nats", "n_targets", "n_bytes")}
    return {**counted, **{name: getattr(evaluation, name) for name in ("loss", "perplexity", "bits_per_byte")}}
