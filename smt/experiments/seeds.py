"""What a study finds over its seeds: means of the cells that differ in nothing else, and of their differences to a control.

Cells of one seed read the same text in the same order, so that differences are taken within a seed first, then their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from smt.evaluation.scorer import TokenScores
from smt.evaluation.statistics import Estimate, mean_of
from smt.experiments.settings import Cell
from smt.runtime.tables import aligned


@dataclass(frozen=True)
class OverSeeds:
    """One variant, with every seed.

    Attributes:
        name: of the cells, without their seed.
        loss: the lowest held-out loss of each, in nats per token.
        difference: to the control, in nats per token; None: it is the control, or there is none.
    """

    name: str
    loss: Estimate
    difference: Estimate | None


def over_seeds(cells: Sequence[Cell], losses: Mapping[str, float], differences: Mapping[str, float]) -> list[OverSeeds]:
    """The means of all variants whose cells have finished with every seed; none of a study with fewer than two seeds.

    Args:
        losses, differences: by label.
    """
    found = []
    for name, labels in labels_by_name(cells).items():
        if len(labels) > 1 and all(label in losses for label in labels):
            compared = all(label in differences for label in labels)
            difference = mean_of([differences[label] for label in labels]) if compared else None
            found.append(OverSeeds(name, mean_of([losses[label] for label in labels]), difference))
    return found


def mean_scores(cells: Sequence[Cell], scores: Mapping[str, Sequence[TokenScores]]) -> dict[str, list[TokenScores]]:
    """By name, the mean log-probabilities over seeds, and what is likeliest with each; where the cells of all are there."""
    found = {}
    for name, labels in labels_by_name(cells).items():
        if all(label in scores for label in labels):
            found[name] = [
                TokenScores(
                    torch.stack([score.log_probs for score in of_seeds]).mean(0),
                    torch.stack([score.greedy for score in of_seeds]).all(0),
                )
                for of_seeds in zip(*(scores[label] for label in labels), strict=True)
            ]
    return found


def labels_by_name(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """The labels of the cells that differ in the seed alone."""
    labels: dict[str, list[str]] = {}
    for cell in cells:
        labels.setdefault(cell.name, []).append(cell.label)
    return labels


def as_text(found: Sequence[OverSeeds]) -> str:
    """A table for a terminal."""
    rows = [(one.name, _shown(one.loss, "{:.4f}"), _shown(one.difference, "{:+.4f}")) for one in found]
    return aligned([("over seeds", "best loss", "difference"), *rows], {1, 2}, rule=True)


def _shown(figure: Estimate | None, form: str) -> str:
    return "-" if figure is None else f"{form.format(figure.mean)} ± {figure.standard_error:.4f}"
