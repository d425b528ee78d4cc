"""What a study ends with: its table and plot, loss by position of all cells, and their differences to a control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smt.config import SMTConfig
from smt.data.sources import read_corpus
from smt.evaluation.ablation import slot_reach
from smt.evaluation.plots import plot_position_differences, plot_positions
from smt.evaluation.position import LossByPosition, loss_by_position
from smt.evaluation.scorer import TokenScores
from smt.evaluation.subjects import open_run
from smt.evaluation.text import held_out_text, other_text
from smt.experiments.comparison import Comparison
from smt.experiments.paired import PairedDifference, paired_difference
from smt.experiments.record import RunRecord
from smt.experiments.run import CellOutcome
from smt.experiments.seeds import OverSeeds, mean_scores, over_seeds
from smt.experiments.settings import Study
from smt.runtime.device import find_device
from smt.runtime.pictures import draw_all

STEM, POSITION_FILE = "ablation_results", "loss_by_position.png"


# What draws a plot to a path.
Draw = Callable[[Path], None]


@dataclass(frozen=True)
class StudyReport:
    """What was found.

    Attributes:
        comparison: of the cells that finished; None: none did.
        over_seeds: of the variants that finished with every seed, where the study has several.
        failures: messages by label.
        more: what the JSON of the comparison has beside the table.
        plots: what draws each, by the name of its file.
    """

    comparison: Comparison | None
    over_seeds: list[OverSeeds]
    failures: dict[str, str]
    more: dict[str, Any]
    plots: dict[str, Draw]

    def save(self, folder: str | Path) -> list[Path]:
        """Leave ``ablation_results`` in ``folder``, then the plots; the paths of what could be written."""
        files = [] if self.comparison is None else self.comparison.save(folder, STEM, **self.more)
        return files + draw_all(Path(folder), self.plots)


def report_study(study: Study, outcomes: Sequence[CellOutcome], control: str | None = None) -> StudyReport:
    """Compare the cells that finished.

    Args:
        control: a label, or a variant, which stands for its cell of the same budget and seed; None: no differences.

    Raises:
        ValueError: there is no such control.
    """
    controls = {} if control is None else {cell.label: study.control_of(cell, control).label for cell in study.cells}
    failures = {outcome.cell.label: outcome.error for outcome in outcomes if outcome.error is not None}
    finished = [outcome for outcome in outcomes if outcome.error is None]
    if not finished:
        return StudyReport(None, [], failures, {}, {})
    notes = [f"{label} failed: {error}" for label, error in failures.items()]
    scores, why_not = score_cells(finished)
    differences: dict[str, PairedDifference] = {}
    positions: dict[str, LossByPosition] = {}
    by_position: dict[str, dict[str, LossByPosition]] = {}
    plots: dict[str, Draw] = {}
    if why_not is not None:
        notes.append(f"no loss by position{' and no differences to a control' if controls else ''}: {why_not}")
    else:
        positions = {name: loss_by_position(score) for name, score in mean_scores(study.cells, scores).items()}
        if positions:  # else no variant has finished with every seed
            plots[POSITION_FILE] = partial(_plot_positions, positions, finished)
        if any(outcome.cell.config.data.source == "recall" for outcome in finished):
            notes.append(
                f"loss by position{' and differences' if controls else ''} count every word; "
                "perplexity and bits per byte are of the answers, which models trained on recall have learned"
            )
        differences = {
            label: paired_difference(score, scores[controls[label]])
            for label, score in scores.items()
            if controls.get(label) in scores and controls[label] != label
        }
        by_position = _differences_by_position(study, scores, {label: controls[label] for label in differences})
        for name, curves in by_position.items():
            plots[f"loss_more_than_{name}.png"] = partial(_plot_differences, curves, name)
        if differences:
            first, named = next(iter(differences.values())), {controls[label] for label in differences}
            notes.append(
                f"difference: nats per token more than {' or '.join(sorted(named))} on the same {first.n_tokens:,} tokens, "
                f"below 0 is better; ± one standard error over {first.n_units} {first.unit}"
            )
    missing = sorted({controls[label] for label in scores if controls and controls[label] not in scores})
    notes += [f"no differences to {label}, which has not finished" for label in missing]
    records = [RunRecord.read(outcome.folder, outcome.cell.label) for outcome in finished]
    nats = {label: found.nats for label, found in differences.items()}
    means = over_seeds(study.cells, {record.name: record.best_loss for record in records}, nats)
    rows = {label: _row(found, controls[label], len({*controls.values()}) > 1) for label, found in differences.items()}
    more = {
        "study": study.name,
        "failures": failures,
        "loss_by_position": _dicts(positions),
        "differences": {label: {**asdict(found), "control": controls[label]} for label, found in differences.items()},
        "differences_by_position": {name: _dicts(curves) for name, curves in by_position.items()},
        "over_seeds": [asdict(found) for found in means],
    }
    return StudyReport(Comparison.of(records, notes, rows), means, failures, more, plots)


def score_cells(finished: Sequence[CellOutcome]) -> tuple[dict[str, list[TokenScores]], str | None]:
    """The scores of every cell on its held-out documents, by label; none, and the reason, where that cannot be.

    What is scored are the weights that the run kept, those of its best evaluation.
    """
    scores: dict[str, list[TokenScores]] = {}
    first: tuple[str, tuple[torch.Tensor, ...]] | None = None
    for outcome in finished:
        config, label = outcome.cell.config, outcome.cell.label
        try:
            subject = open_run(outcome.folder, find_device(config.training.device))
        except ValueError as error:
            return {}, f"{label} cannot be scored: {error}"
        corpus = read_corpus(config.data)
        if changed := other_text(corpus, outcome.folder):
            return {}, f"{label} cannot be scored: {changed}"
        documents = held_out_text(corpus, subject.tokenizer, config.data.eval_documents).documents
        first = first or (label, documents)
        if len(documents) != len(first[1]) or not all(map(torch.equal, documents, first[1])):
            return {}, f"the held-out tokens of {label} are not those of {first[0]}"
        scores[label] = subject.scorer.score(documents)
    return scores, None


def _plot_positions(curves: Mapping[str, LossByPosition], finished: Sequence[CellOutcome], path: Path) -> None:
    models = [model for outcome in finished if isinstance(model := outcome.cell.config.model, SMTConfig)]
    marks = {}
    for name, positions in {
        "window's tokens": {model.m_input_tokens for model in models},
        "reach of the slots": {slot_reach(model) for model in models},
    }.items():
        if len(positions) == 1:  # else it is another one in every cell
            marks[name] = positions.pop()
    plot_positions(curves, marks, path)


def _differences_by_position(
    study: Study, scores: Mapping[str, Sequence[TokenScores]], controls: Mapping[str, str]
) -> dict[str, dict[str, LossByPosition]]:
    """How much more cells lose than their controls, by the name of the control, then of the cell: means over seeds."""
    names = {cell.label: cell.name for cell in study.cells}
    differences = {
        label: [
            TokenScores(score.log_probs - of_control.log_probs, score.greedy)
            for score, of_control in zip(scores[label], scores[control], strict=True)
        ]
        for label, control in controls.items()
    }
    of_control = {names[label]: names[control] for label, control in controls.items()}
    found: dict[str, dict[str, LossByPosition]] = {}
    for name, difference in mean_scores(study.cells, differences).items():
        found.setdefault(of_control[name], {})[name] = loss_by_position(difference, bins_per_octave=1)
    return found


def _plot_differences(curves: Mapping[str, LossByPosition], control: str, path: Path) -> None:
    """How much more cells lose than ``control``, by position."""
    # Names of cells are "budget,variant", and those of one budget differ in the variant; those of a grid name their fields.
    budget, comma, variant = ("", "", control) if "=" in control else control.rpartition(",")
    shown = {_words(name.removeprefix(budget + comma)): curve for name, curve in curves.items()}
    plot_position_differences(shown, _words(variant) + (f" ({_words(budget)})" if budget else ""), path)


def _dicts(curves: Mapping[str, LossByPosition]) -> dict[str, dict[str, Any]]:
    return {name: asdict(curve) for name, curve in curves.items()}


def _words(label: str) -> str:
    """A label of cells as a plot shows it."""
    return label.replace("_", " ").replace(",", ", ")


def _row(found: PairedDifference, control: str, several: bool) -> dict[str, Any]:
    row = {"difference": found.nats, "standard_error": found.standard_error}
    return {**row, "control": control} if several else row
