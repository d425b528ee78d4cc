"""One evaluation from models and text to a report: a table, results, and what draws their plots."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smt.config import SMTConfig
from smt.data.documents import Corpus
from smt.data.recall import RecallTask, words
from smt.data.settings import DataConfig
from smt.data.sources import read_corpus
from smt.data.tokenizer import Tokenizer
from smt.evaluation import plots
from smt.evaluation.ablation import NO_WRITES, Ablation, ablate, slot_reach, without_writes
from smt.evaluation.needle import ENGLISH, needle_in_haystack, recall_style, usual_lengths
from smt.evaluation.perplexity import Evaluation
from smt.evaluation.pooling import analyse_pooling
from smt.evaluation.position import fall_between, loss_by_position
from smt.evaluation.recall import encode_words, recall, usual_distances
from smt.evaluation.report import Report
from smt.evaluation.scorer import SMTScorer, TokenScores
from smt.evaluation.subjects import Subject
from smt.evaluation.text import HeldOutText, held_out_text, other_text
from smt.runtime.fields import check_at_least, check_names, check_seed
from smt.runtime.tables import shown_perplexity


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated, and how much of it.

    Args:
        tasks: of ``TASKS``; the order does not matter.
        documents: held-out documents at most, the first of them; None: all.
        trials: needles in each cell of the grid, and documents for each distance of recall.
        seed: of the needles.
    """

    tasks: tuple[str, ...] = ("perplexity", "position", "needle", "recall", "ablation", "pooling")
    documents: int | None = None
    trials: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_names("tasks", self.tasks, TASKS)
        check_at_least(self, 1, "documents", "trials")
        check_seed("seed", self.seed)
        if not self.tasks:
            raise ValueError(f"tasks must name at least one of {', '.join(TASKS)}, got none")


class EvaluationRun:
    """The subjects, their text and scores, made when a task first needs them."""

    def __init__(self, subjects: Sequence[Subject], data: DataConfig, config: EvaluationConfig, report: Report) -> None:
        self.subjects, self.data, self.config, self.report = subjects, data, config, report
        self._corpus: Corpus | None = None
        self._texts: dict[Tokenizer, HeldOutText] = {}
        self._scores: dict[str, list[TokenScores]] = {}

    @property
    def corpus(self) -> Corpus:
        """The splits of the source."""
        self._corpus = self._corpus or read_corpus(self.data)
        return self._corpus

    @property
    def ours(self) -> list[Subject]:
        """The subjects whose memory can be looked at."""
        return [subject for subject in self.subjects if subject.model is not None and subject.model.config.writes]

    @property
    def window(self) -> tuple[int, int, int]:
        """Tokens and entries of the window, and the reach of its slots: of the first of our models, else those by default."""
        config = next((subject.model.config for subject in self.subjects if subject.model is not None), SMTConfig())
        return config.m_input_tokens, config.window_size, slot_reach(config)

    @property
    def marks(self) -> dict[str, int]:
        """What is marked in plots over positions and distances; nothing where no model is ours."""
        if all(subject.model is None for subject in self.subjects):
            return {}
        window, _, reach = self.window
        return {"window's tokens": window, "reach of the slots": reach}

    @property
    def recall_task(self) -> RecallTask:
        """That of the data where they are recall, else the usual one."""
        return RecallTask(**self.data.recall)

    def text(self, subject: Subject) -> HeldOutText:
        """The held-out documents in the subject's tokens, made once with each tokenizer: a control has its model's."""
        if subject.tokenizer not in self._texts:
            self._texts[subject.tokenizer] = held_out_text(self.corpus, subject.tokenizer, self.config.documents)
        return self._texts[subject.tokenizer]

    def scores(self, subject: Subject) -> list[TokenScores]:
        """The scores of these documents."""
        if subject.name not in self._scores:
            self._scores[subject.name] = subject.scorer.score(self.text(subject).documents)
        return self._scores[subject.name]

    def with_controls(self) -> list[Subject]:
        """The subjects, and behind each of ours the same weights without writes."""
        chosen = []
        for subject in self.subjects:
            chosen.append(subject)
            if subject in self.ours:
                control = without_writes(subject.model)
                chosen.append(Subject(f"{subject.name}, {NO_WRITES}", SMTScorer(control), subject.tokenizer, control))
        return chosen

    def draw(self, name: str, plot: Callable[..., None], *arguments: Any) -> None:
        """Have a plot drawn when everything has been measured."""
        self.report.plots[name] = partial(plot, *arguments)


def evaluate_subjects(
    subjects: Sequence[Subject],
    data: DataConfig,
    config: EvaluationConfig,
    report: Report | None = None,
    *,
    run_folder: str | Path | None = None,
) -> Report:
    """Run the tasks of ``config`` on every subject.

    Args:
        report: filled task by task, so that what was measured before an error is not lost; None: a new one.
        run_folder: of a run whose own ``data`` these are; that its held-out text has changed since is noted.

    Raises:
        ValueError: two subjects of one name, a text that cannot be read, or none that is long enough for a task.
    """
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"subjects must be one or more of different names, got {', '.join(names) or 'none'}")
    report = Report() if report is None else report
    models = {subject.name: asdict(subject.model.config) if subject.model else {} for subject in subjects}
    report.settings |= {"models": models, "data": asdict(data), "evaluation": asdict(config)}
    run = EvaluationRun(subjects, data, config, report)
    changed = None if run_folder is None else other_text(run.corpus, run_folder)
    if changed:
        report.notes.append(changed)
    for task in [name for name in TASKS if name in config.tasks]:
        TASKS[task](run)
    if data.source == "recall" and set(config.tasks) & {"perplexity", "position", "ablation"}:
        report.notes.append("perplexity, position and ablation count every word; a model trained on recall has learned answers")
    return report


def _perplexity(run: EvaluationRun) -> None:
    for subject in run.subjects:
        text, scores = run.text(subject), run.scores(subject)
        nats = -sum(score.log_probs.sum().item() for score in scores)
        result = Evaluation(nats, text.n_targets, text.n_bytes, text.n_characters)
        derived = {name: getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte", "bits_per_character")}
        figures = {
            "tokens": f"{result.n_targets:,}",
            "loss (nats per token)": f"{result.loss:.4f}",
            "perplexity": shown_perplexity(result.perplexity),
            "bits per byte": f"{result.bits_per_byte:.4f}",
            "bits per character": f"{result.bits_per_character:.4f}",
        }
        run.report.add("perplexity", subject.name, {**asdict(result), **derived}, figures)


def _position(run: EvaluationRun) -> None:
    window, _, reach = run.window
    curves = {}
    for subject in run.subjects:
        scores = run.scores(subject)
        curves[subject.name] = loss_by_position(scores)
        fall = fall_between(scores, (window, reach), (reach, 2 * reach))
        margin = "" if fall is None or fall.margin is None else f" ± {fall.margin:.4f}"
        shown = f"no document of {2 * reach} tokens"
        if fall is not None:
            shown = f"{fall.nats:.4f}{margin}, {fall.n_documents} documents"
        figures = {f"fall of the loss from {window}..{reach} to {reach}..{2 * reach}": shown}
        result = {**asdict(curves[subject.name]), "fall": fall and asdict(fall)}
        run.report.add("position", subject.name, result, figures)
    run.draw("loss_by_position.png", plots.plot_positions, curves, run.marks)


def _needle(run: EvaluationRun) -> None:
    _, size, _ = run.window
    synthetic = run.data.source == "recall"
    style = recall_style(run.recall_task) if synthetic else ENGLISH
    grids = {}
    for subject in run.with_controls():
        if synthetic:
            fillers = random.Random(run.config.seed).choices(words("f", run.recall_task.fillers), k=32 * size)
            haystack = encode_words(fillers, subject.tokenizer)[0][1:]
        else:
            haystack = torch.cat([document[1:-1] for document in run.text(subject).documents])
        lengths = usual_lengths(size, len(haystack))
        if not lengths:
            raise ValueError(f"a needle needs a haystack of {size} tokens, the held-out text has {len(haystack)}")
        options = {"n_trials": run.config.trials, "seed": run.config.seed, "n_candidates": min(8, len(style.values))}
        grid = needle_in_haystack(subject.scorer, subject.tokenizer, haystack, style, lengths=lengths, **options)
        grids[subject.name] = grid
        columns = [sum(row[column] for row in grid.accuracy) / len(grid.depths) for column in range(len(lengths))]
        figures = {f"found in {length:,} tokens": f"{share:.1%}" for length, share in zip(lengths, columns, strict=True)}
        figures["chance"] = f"{grid.chance:.1%}"
        run.report.add("needle", subject.name, asdict(grid), figures)
    run.draw("needle.png", plots.plot_needles, grids)


def _recall(run: EvaluationRun) -> None:
    _, size, _ = run.window
    results = {}
    for subject in run.with_controls():
        distances = usual_distances(size)
        result = recall(subject.scorer, subject.tokenizer, run.recall_task, distances, n_documents=4 * run.config.trials)
        results[subject.name] = result
        figures = {f"recalled after {there.distance:,} words": f"{there.accuracy:.1%}" for there in result.distances}
        figures["chance"] = f"{result.chance:.1%}"
        run.report.add("recall", subject.name, asdict(result), figures)
    if run.data.source != "recall":
        run.report.notes.append("recall: the models were not trained on the source recall, whose words it asks for")
    run.draw("recall.png", plots.plot_recall, results, run.marks)


def _ablation(run: EvaluationRun) -> None:
    for subject in _with_memory(run, "ablation"):
        window, _, reach = run.window
        results = ablate(subject.model, run.text(subject).documents, run.scores(subject))
        figures = {name: _losses(result) for name, result in results.items()}
        run.report.add("ablation", subject.name, {name: asdict(result) for name, result in results.items()}, figures)
        spans = {"window": f"1 to {window}", "slots": f"{window + 1} to {reach}", "beyond": f"beyond {reach}", "all": "all"}
        run.draw("ablation.png", plots.plot_ablations, results, spans)


def _pooling(run: EvaluationRun) -> None:
    for subject in _with_memory(run, "pooling"):
        result = analyse_pooling(subject.model, run.text(subject).documents)
        figures = {
            "weight of the slots": f"{result.mean.ssm_total:.1%}",
            "weight of the tokens": f"{result.mean.input_total:.1%}",
            "largest weight of a slot": f"{result.mean.ssm_max:.1%}",
            "largest weight of a token": f"{result.mean.input_max:.1%}",
            "entropy (nats)": f"{result.mean.entropy:.3f}, uniform {math.log(len(result.weights)):.3f}",
        }
        run.report.add("pooling", subject.name, asdict(result), figures)
        run.draw("pooling.png", plots.plot_pooling, result)


TASKS: dict[str, Callable[[EvaluationRun], None]] = {
    "perplexity": _perplexity,
    "position": _position,
    "needle": _needle,
    "recall": _recall,
    "ablation": _ablation,
    "pooling": _pooling,
}


def _with_memory(run: EvaluationRun, task: str) -> list[Subject]:
    others = [subject.name for subject in run.subjects if subject not in run.ours]
    if others:
        run.report.notes.append(f"{task}: not for {', '.join(others)}, without a memory")
    return run.ours


def _losses(result: Ablation) -> str:
    there = {name: mean for name, mean in vars(result).items() if mean is not None}
    return ", ".join(f"{name} {mean.nats:.4f}" for name, mean in there.items())
