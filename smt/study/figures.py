"""Figures of a study over its seeds: their mean and spread, and which model has the best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smt.study.cell import EQUAL_TIME, ORPO, TRAINING
from smt.study.paired_test import SIGNIFICANCE, p_value

Study = Mapping[str, Any]
# How models and stages are called in tables and plots.
NAMES = {
    "mamba": "Mamba",
    "global": "global attention",
    "local": "local attention",
    "hybrid_50_50": "hybrid 50/50",
    "hybrid": "hybrid by layer",
    "parallel": "parallel hybrid",
    "smt": "SMT (stream)",
    "smt_carried": "SMT, carried",
}
STAGE_NAMES = {TRAINING: "stage 1", EQUAL_TIME: "stage 1, equal time", ORPO: "stage 2 (ORPO)"}


@dataclass(frozen=True)
class Figure:
    """A figure over seeds.

    Attributes:
        of_seeds: its value with each of them.
    """

    of_seeds: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.of_seeds.values())

    @property
    def spread(self) -> float | None:
        """Their sample standard deviation; None with fewer than two."""
        return statistics.stdev(self.of_seeds.values()) if len(self.of_seeds) > 1 else None

    def text(self, show: Callable[[float], str]) -> str:
        """``mean ± spread``, or the mean alone where all seeds have it."""
        return show(self.mean) + (f" ± {show(self.spread)}" if self.spread else "")


@dataclass(frozen=True)
class Best:
    """The model with the best mean.

    Attributes:
        model: which.
        figure: its own.
        alike: models that are not significantly different; None: of one seed, which tells nothing of it.
    """

    model: str
    figure: Figure
    alike: list[str] | None


def over_seeds(study: Study, model: str, stage: str, find: Callable[[Mapping[str, Any]], Any]) -> Figure | None:
    """A figure of all runs of a model in a stage; None where no run has it."""
    found = {run["seed"]: find(run) for run in study["runs"] if (run["model"], run["stage"]) == (model, stage)}
    there = {seed: float(value) for seed, value in found.items() if value is not None}
    return Figure(there) if there else None


def at(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    """What finds a value inside of mappings; None where one of them is missing."""

    def find(values: Any) -> Any:
        for name in path:
            if values is None:
                return None
            values = values.get(name)
        return values

    return find


def scaled(unit: float, *path: str) -> Callable[[Mapping[str, Any]], float | None]:
    """As ``at``, in units."""
    find = at(*path)

    def in_units(values: Any) -> float | None:
        value = find(values)
        return None if value is None else value / unit

    return in_units


def best(study: Study, stage: str, find: Callable[[Mapping[str, Any]], Any], *, lowest: bool) -> Best | None:
    """The model with the best mean; None where no run has the figure.

    Two models are significantly different where a paired t-test over their seeds says so (``smt.study.paired_test``).
    """
    figures = {model: over_seeds(study, model, stage, find) for model in study["models"]}
    there = {model: figure for model, figure in figures.items() if figure is not None}
    if not there:
        return None
    first, *others = sorted(there, key=lambda model: there[model].mean if lowest else -there[model].mean)
    several = len(there[first].of_seeds) > 1
    alike = [model for model in others if not _is_significant(there[model], there[first])] if several else None
    return Best(first, there[first], alike)


def _is_significant(one: Figure, other: Figure) -> bool:
    differences = [one.of_seeds[seed] - other.of_seeds[seed] for seed in one.of_seeds if seed in other.of_seeds]
    return len(differences) > 1 and p_value(differences) < SIGNIFICANCE


def listed(models: Sequence[str]) -> str:
    """Models by their names."""
    return ", ".join(NAMES[model] for model in models)
