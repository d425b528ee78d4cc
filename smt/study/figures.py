"""Figures of a study over its seeds: their mean and spread, and which model has the best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Study = Mapping[str, Any]
# How models are called in tables and plots.
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


@dataclass(frozen=True)
class Figure:
    """A figure over seeds.

    Attributes:
        mean: over them.
        spread: their sample standard deviation; None with fewer than two.
        count: how many there are.
    """

    mean: float
    spread: float | None
    count: int

    def text(self, show: Callable[[float], str]) -> str:
        """``mean ± spread``."""
        return show(self.mean) + ("" if self.spread is None else f" ± {show(self.spread)}")


def over_seeds(study: Study, model: str, stage: str, find: Callable[[Mapping[str, Any]], Any]) -> Figure | None:
    """A figure of all runs of a model in a stage; None where no run has it."""
    of_runs = [find(run) for run in study["runs"] if (run["model"], run["stage"]) == (model, stage)]
    values = [float(value) for value in of_runs if value is not None]
    if not values:
        return None
    return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def at(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    """What finds a value inside of mappings; None where one of them is missing."""

    def find(values: Any) -> Any:
        for name in path:
            if values is None:
                return None
            values = values.get(name)
        return values

    return find


def best(
    study: Study, stage: str, find: Callable[[Mapping[str, Any]], Any], *, lowest: bool
) -> tuple[list[str], Figure] | None:
    """The model with the best mean, followed by those that cannot be told from it, and its figure.

    Two models are told apart where their means differ by more than the sum of their spreads; by one seed alone, wherever they
    differ.
    """
    figures = {model: over_seeds(study, model, stage, find) for model in study["models"]}
    there = {model: figure for model, figure in figures.items() if figure is not None}
    if not there:
        return None
    order = sorted(there, key=lambda model: there[model].mean if lowest else -there[model].mean)
    first = there[order[0]]
    alike = [
        model
        for model in order[1:]
        if abs(there[model].mean - first.mean) <= (there[model].spread or 0.0) + (first.spread or 0.0)
    ]
    return [order[0], *alike], first


def listed(models: Sequence[str]) -> str:
    """Models by their names."""
    return ", ".join(NAMES[model] for model in models)
