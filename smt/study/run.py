"""Run a study: a process for each model and seed, one after the other; what has been done is not done again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smt.experiments.run import OUTPUT_FILE, attempt_apart
from smt.runtime.files import read_json
from smt.study.cell import EQUAL_TIME_STEPS, TRAINING, as_yaml, ask, asked_before, check_same, is_done, measured_file
from smt.study.prepared import Prepared
from smt.study.rates import chosen_rates

CELL_MODULE = "smt.study.cell"


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


def cells_of(prepared: Prepared) -> list[StudyCell]:
    """Every model with the first seed, then with the next."""
    return [
        StudyCell(model, seed, prepared.folder / f"{model},seed={seed}")
        for seed in prepared.settings.seeds
        for model in prepared.settings.models
    ]


def run_study(prepared: Prepared, tell: Callable[[str], None] = print) -> list[StudyCell]:
    """Run every cell that has not been; one that fails does not stop the others.

    Raises:
        ValueError: a folder holds a cell of another study, and nothing is run then; or no learning rate that was tried suits a
            model.
    """
    settings = prepared.settings
    cells, seeds = cells_of(prepared), settings.seeds[: settings.equal_time_seeds]
    rates = chosen_rates(prepared, tell)
    wanted = {cell.label: _wanted(prepared, cell, rates.get(cell.model)) for cell in cells}
    for cell in cells:
        check_same(cell.folder, wanted[cell.label])
        wanted[cell.label][EQUAL_TIME_STEPS] = asked_before(cell.folder).get(EQUAL_TIME_STEPS)  # decided when it ran before
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
    ask(cell.folder, wanted)
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


def _wanted(prepared: Prepared, cell: StudyCell, learning_rate: float | None) -> dict[str, Any]:
    """What the process of a cell is to do, as YAML can hold it."""
    settings = prepared.settings
    of_pairs = ("n_pairs", "n_held_out_pairs", "prompt_length", "completion_length")
    wanted = {
        "run": prepared.training_of(cell.model, cell.seed, learning_rate).to_dict(),
        "orpo": settings.orpo,
        "pairs": {name: getattr(settings, name) for name in of_pairs},
        **{name: getattr(settings, name) for name in ("context", "decode_tokens", "sample_tokens")},
        EQUAL_TIME_STEPS: None,
    }
    return as_yaml(wanted)
