"""What an evaluation has found: results by task and model, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """What an evaluation ends with.

    Attributes:
        results: by task and model, as ``evaluation.json`` has them.
        rows: of the table: task, model, what was measured, and its value.
        notes: what was left out, and why.
        files: written so far.
    """

    results: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def add(self, task: str, model: str, result: Any, figures: Mapping[str, str]) -> None:
        """Keep ``result`` and the lines that the table has of it."""
        self.results.setdefault(task, {})[model] = result
        self.rows += [(task, model, name, value) for name, value in figures.items()]

    def table(self) -> str:
        """The figures of all tasks and models in columns."""
        header = ("task", "model", "figure", "value")
        widths = [max(len(row[column]) for row in [header, *self.rows]) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *self.rows]]
        return "\n".join([lines[0].rstrip(), "-" * sum(widths, 6), *(line.rstrip() for line in lines[1:])])
