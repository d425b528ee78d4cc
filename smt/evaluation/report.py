"""What an evaluation has found: results by task and model, their table, and the files that it is left in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smt.runtime.files import check_folder, finite, text_writer, write_files
from smt.runtime.names import in_one_line
from smt.runtime.pictures import draw_all
from smt.runtime.tables import aligned

RESULTS_FILE = "evaluation.json"


@dataclass
class Report:
    """What an evaluation has found so far.

    Attributes:
        settings: of the evaluation, as ``evaluation.json`` has them: ``models``, ``data`` and ``evaluation``.
        results: by task and model.
        rows: of the table: task, model, what was measured, and its value.
        notes: what was left out, and why.
        plots: what draws each to a path, by the name of its file.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plots: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    def add(self, task: str, model: str, result: Any, figures: Mapping[str, str]) -> None:
        """Keep ``result`` and the lines that the table has of it."""
        self.results.setdefault(task, {})[model] = result
        self.rows += [(task, in_one_line(model), name, value) for name, value in figures.items()]

    def table(self) -> str:
        """The figures of all tasks and models in columns."""
        return aligned([("task", "model", "figure", "value"), *self.rows], rule=True)

    def save(self, out: str | Path) -> list[Path]:
        """Leave ``evaluation.json`` in the folder ``out``, then the plots; the paths of what could be written.

        Raises:
            ValueError: ``out`` cannot be written.
        """
        out = check_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        values = finite({**self.settings, "notes": self.notes, "results": self.results})
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        write_files({out / RESULTS_FILE: text_writer(text)})
        return [out / RESULTS_FILE, *draw_all(out, self.plots)]
