"""Finished runs beside each other: one table, as text, Markdown, CSV and JSON, and one plot. Needs no torch."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smt.experiments.record import RunRecord
from smt.runtime.files import check_folder, finite, text_writer, write_files
from smt.runtime.names import in_markdown, in_one_line
from smt.runtime.pictures import draw_all
from smt.runtime.tables import aligned, markdown, shown_perplexity
from smt.training import plots

# Keys of a row: the column's title, and how its values are shown.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "run": ("run", str),
    "experiment": ("experiment", str),
    "encoding": ("encoding", str),
    "pool_source": ("pool source", str),
    "parameters": ("parameters", "{:,}".format),
    "steps": ("steps", "{:,}".format),
    "tokens": ("tokens", "{:,}".format),
    "bits_per_byte": ("bits per byte", "{:.4f}".format),
    "perplexity": ("perplexity", shown_perplexity),
    "best_loss": ("best loss", "{:.4f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "difference": ("difference", "{:+.4f}".format),
    "standard_error": ("± s.e.", "{:.4f}".format),
    "control": ("control", str),
}
# There only where runs are compared with a control.
OF_A_CONTROL = ("difference", "standard_error", "control")
NUMBERS = ("parameters", "steps", "tokens", "bits_per_byte", "perplexity", "best_loss", "tokens_per_second", *OF_A_CONTROL[:2])


@dataclass(frozen=True)
class Comparison:
    """Finished runs, best first.

    Attributes:
        records: the runs.
        by: the key that they are sorted by: ``perplexity``, or ``bits_per_byte`` where the tokens differ.
        notes: what must be known to read the table.
        differences: by the run's name, its ``difference`` to a control, the ``standard_error`` of it, and which ``control``.
    """

    records: tuple[RunRecord, ...]
    by: str
    notes: tuple[str, ...]
    differences: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(
        cls,
        records: Sequence[RunRecord],
        notes: Sequence[str] = (),
        differences: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Comparison:
        """Sort the runs, and note whether they can be compared at all.

        Raises:
            ValueError: no run.
        """
        if not records:
            raise ValueError("a comparison needs a finished run, got none")
        by, found = "perplexity", []
        if len({record.tokenizer for record in records}) > 1:
            by = "bits_per_byte"
            found.append(
                "the runs have different tokenizers, whose perplexities and losses per token do not compare: "
                "sorted by bits per byte"
            )
        if len({record.held_out for record in records}) > 1:
            found.append("the runs were evaluated on different held-out texts: their figures do not compare")
        best_first = sorted(records, key=lambda record: _last_if_nan(getattr(record, by)))
        return cls(tuple(best_first), by, (*found, *notes), differences or {})

    def rows(self) -> list[dict[str, Any]]:
        """The values of each run by column; a figure that is not finite as None."""
        own = [name for name in COLUMNS if name not in ("run", *OF_A_CONTROL)]
        more = [name for name in OF_A_CONTROL if any(name in row for row in self.differences.values())]
        rows = []
        for record in self.records:
            values = {"run": record.name, **{name: getattr(record, name) for name in own}}
            difference = self.differences.get(record.name, {})
            rows.append(finite({**values, **{name: difference.get(name) for name in more}}))
        return rows

    def text(self) -> str:
        """The table for a terminal, and its notes."""
        return "\n".join([aligned(*self._cells(), rule=True), *(f"note: {note}" for note in self.notes)])

    def markdown(self) -> str:
        """The table and its notes."""
        notes = "".join(f"\n{in_markdown(note[0].upper() + note[1:])}.\n" for note in self.notes)
        return f"{markdown(*self._cells())}\n{notes}"

    def csv(self) -> str:
        """The rows, unrounded."""
        rows = self.rows()
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()

    def json(self, **more: Any) -> str:
        """The rows, what they are sorted by, the notes and ``more``."""
        values = {"sorted_by": self.by, "runs": self.rows(), "notes": list(self.notes), **more}
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    def save(self, folder: str | Path, stem: str, **more: Any) -> list[Path]:
        """Write the table as ``stem``.md, .csv and .json, then the plot as .png; ``more`` goes into the JSON.

        Returns:
            the paths of what could be written: there may be no plot, and a warning in its place.
        """
        folder = check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {".md": self.markdown(), ".csv": self.csv(), ".json": self.json(**more)}
        files = {folder / f"{stem}{suffix}": text_writer(content) for suffix, content in contents.items()}
        write_files(files)
        figures = {record.name: getattr(record, self.by) for record in self.records}
        histories = {record.name: record.history for record in self.records}
        draw = partial(plots.comparison, figures, histories, label=COLUMNS[self.by][0])
        return [*files, *draw_all(folder, {f"{stem}.png": draw})]

    def _cells(self) -> tuple[list[list[str]], list[int]]:
        """The table, and which of its columns are numbers."""
        rows = self.rows()
        shown = [["-" if row[key] is None else in_one_line(COLUMNS[key][1](row[key])) for key in row] for row in rows]
        return [[COLUMNS[key][0] for key in rows[0]], *shown], [index for index, key in enumerate(rows[0]) if key in NUMBERS]


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
