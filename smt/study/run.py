"""Run a study: a process for each model and seed, one after the other; what has been done is not done again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from smt.data.settings import DataConfig
from smt.data.tokenized import TokenizedCorpus, tokenize_corpus
from smt.data.tokenizer import TRAINED
from smt.experiments.cell import FAILURE_FILE
from smt.experiments.run import OUTPUT_FILE, attempt_apart
from smt.runtime.fields import check_names
from smt.runtime.files import check_folder, read_json, read_yaml, text_writer, write_files
from smt.study.cell import CELL_FILE, TRAINING, is_done, measured_file
from smt.study.preference import PAIRS_FILE
from smt.study.settings import CARRIED, StudySettings
from smt.study.sizes import Sized, sized_models
from smt.training.second_stage import SECOND_STAGE
from smt.training.settings import RunConfig

CELL_MODULE = "smt.study.cell"
# Set when all models have been trained for as many tokens, so it tells no two studies apart.
EQUAL_TIME_STEPS = "equal_time_steps"
VOCABULARY = 4000


@dataclass(frozen=True)
class StudyCell:
    """A model with a seed.

    Attributes:
        model, seed: which.
        folder: of all that is left of it.
        error: why it has not come to its end; None: it has.
    """

    model: str
    seed: int
    folder: Path
    error: str | None = None

    @property
    def label(self) -> str:
        """How it is called."""
        return f"{self.model},seed={self.seed}"


@dataclass(frozen=True)
class Prepared:
    """A study whose text has been read and whose models have been sized.

    Attributes:
        settings: what is compared.
        folder: of its results.
        text: what all models read.
        models: by name.
    """

    settings: StudySettings
    folder: Path
    text: TokenizedCorpus
    models: dict[str, Sized]

    @property
    def first_stage(self) -> RunConfig:
        """Data and training of stage 1; the model is none of the study's."""
        return _first_stage(self.settings)

    @property
    def cells(self) -> list[StudyCell]:
        """Every model with the first seed, then with the next."""
        return [
            StudyCell(model, seed, self.folder / f"{model},seed={seed}")
            for seed in self.settings.seeds
            for model in self.settings.models
        ]


def prepare(settings: StudySettings, out: str | Path = "results") -> Prepared:
    """Read the text and size the models.

    Raises:
        ValueError: a text that cannot be read, a field that is wrong, or a folder that cannot be written.
    """
    data, asked = _first_stage(settings).data, _asked_vocabulary(settings)
    _check_second_stage(settings, data)
    folder = check_folder(Path(out) / settings.name)
    text = tokenize_corpus(data, asked)
    vocabulary = text.tokenizer.vocab_size if data.tokenizer in TRAINED else asked
    return Prepared(settings, folder, text, sized_models(settings, vocabulary))


def run_study(prepared: Prepared, tell: Callable[[str], None] = print) -> list[StudyCell]:
    """Run every cell that has not been; one that fails does not stop the others.

    Raises:
        ValueError: a folder holds a cell of another study; nothing is run then.
    """
    cells, seeds = prepared.cells, prepared.settings.seeds[: prepared.settings.equal_time_seeds]
    wanted = {cell.label: _wanted(prepared, cell) for cell in cells}
    for cell in cells:
        _check_same(cell.folder, wanted[cell.label])
        wanted[cell.label][EQUAL_TIME_STEPS] = _there(cell.folder).get(EQUAL_TIME_STEPS)  # decided when it ran before
    ended = {cell.label: _run(cell, wanted[cell.label], f"[{i}/{len(cells)}]", tell) for i, cell in enumerate(cells, 1)}
    finished = [cell for cell in cells if ended[cell.label].error is None]
    timed = [cell for cell in finished if cell.seed in seeds]
    steps = _steps_of_equal_time(finished, {label: asked[EQUAL_TIME_STEPS] for label, asked in wanted.items()})
    for index, cell in enumerate(timed, 1):
        more = {**wanted[cell.label], EQUAL_TIME_STEPS: steps[cell.label]}
        ended[cell.label] = _run(cell, more, f"[equal time {index}/{len(timed)}]", tell)
    return list(ended.values())


def _run(cell: StudyCell, wanted: dict[str, Any], place: str, tell: Callable[[str], None]) -> StudyCell:
    if is_done(cell.folder, equal_time=wanted[EQUAL_TIME_STEPS] is not None):
        tell(f"{place} {cell.label}: finished before, not run again")
        return cell
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / FAILURE_FILE).unlink(missing_ok=True)
    write_files({cell.folder / CELL_FILE: text_writer(yaml.safe_dump(wanted, sort_keys=False))})
    tell(f"{place} {cell.label}: begins, output in {cell.folder / OUTPUT_FILE}")
    started = time.perf_counter()
    ((_, error),) = attempt_apart([cell.folder], 1, CELL_MODULE)
    seconds = f"{time.perf_counter() - started:.0f} s"
    tell(f"{place} {cell.label}: " + (f"finished in {seconds}" if error is None else f"failed after {seconds}: {error}"))
    return replace(cell, error=error)


def _steps_of_equal_time(cells: Sequence[StudyCell], decided: Mapping[str, int | None]) -> dict[str, int]:
    """By label, how many steps of a model take as long as the whole training of the middle one.

    A step of a model takes what it takes in the middle one of its seeds: one that the machine was slow for says little. Where
    steps have been decided before, others, of further seeds or of models that had failed, are given the same time.
    """
    told = {cell.label: read_json(measured_file(cell.folder, TRAINING)) for cell in cells}
    seconds: dict[str, list[float]] = {}
    for cell in cells:
        of = told[cell.label]  # without the time in which a model is compiled, which is no matter of its layout
        seconds.setdefault(cell.model, []).append(of["train_tokens"] / of["tokens_per_second"] / of["steps"])
    of_step = {cell.label: statistics.median(seconds[cell.model]) for cell in cells}
    before = {label: steps for label, steps in decided.items() if steps is not None and label in told}
    whole = {label: of["steps"] for label, of in told.items()}
    times = [steps * of_step[label] for label, steps in (before or whole).items()]
    return {label: before.get(label) or max(1, round(statistics.median(times) / of)) for label, of in of_step.items()}


def _wanted(prepared: Prepared, cell: StudyCell) -> dict[str, Any]:
    """What the process of a cell is to do, as YAML can hold it."""
    settings, sized = prepared.settings, prepared.models[cell.model]
    data = {**settings.run.get("data", {}), **(settings.carried if cell.model == CARRIED else {})}
    run = RunConfig.from_dict(
        {
            "experiment": TRAINING,
            "architecture": sized.architecture,
            "model": {**sized.config.to_dict(), "vocab_size": _asked_vocabulary(settings)},
            "data": data,
            "training": {**settings.run.get("training", {}), "seed": cell.seed},
        }
    )
    of_pairs = ("n_pairs", "n_held_out_pairs", "prompt_length", "completion_length")
    wanted = {
        "run": run.anchored().to_dict(),
        "orpo": settings.orpo,
        "pairs": {name: getattr(settings, name) for name in of_pairs},
        **{name: getattr(settings, name) for name in ("context", "decode_tokens", "sample_tokens")},
        EQUAL_TIME_STEPS: None,
    }
    return yaml.safe_load(yaml.safe_dump(wanted))  # tuples are lists there


def _check_same(folder: Path, wanted: dict[str, Any]) -> None:
    there = _there(folder)
    if not there:
        return
    there[EQUAL_TIME_STEPS] = None
    differing = [name for name in wanted if there.get(name) != wanted[name]]
    if differing:
        raise ValueError(
            f"{folder} is of another study, with other {', '.join(differing)}; give this one another --out or name, or remove "
            "that folder"
        )


def _there(folder: Path) -> dict[str, Any]:
    """What the process of a cell was to do before; nothing where there was none."""
    path = folder / CELL_FILE
    return read_yaml(path) if path.is_file() else {}


def _asked_vocabulary(settings: StudySettings) -> int:
    """Of the tokenizer; a text may give it fewer tokens."""
    return settings.hymba.get("vocab_size", VOCABULARY)


def _first_stage(settings: StudySettings) -> RunConfig:
    check_names("run", settings.run, ("data", "training"))
    config = RunConfig.from_dict(settings.run)
    if config.training.steps is None:
        raise ValueError("run must bound training by a number of steps, got None")
    return config


def _check_second_stage(settings: StudySettings, data: DataConfig) -> None:
    """Raise ValueError for what would end the stage after the first one has run."""
    config = RunConfig.from_yaml(SECOND_STAGE, {"pairs": PAIRS_FILE, "chunk_length": data.chunk_length, **settings.orpo})
    longest = settings.prompt_length + settings.completion_length - 1
    if longest > config.data.chunk_length:
        raise ValueError(
            f"prompt_length + completion_length - 1 must be at most chunk_length = {config.data.chunk_length}, got {longest}"
        )
