"""What the files of a run are called, and whether it has finished. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from smt.runtime.files import read_json

RESULTS_FILE, HISTORY_FILE, CURVES_FILE = "results.json", "metrics_history.json", "training_curves.png"
LOCK_FILE = "run.lock"
# In the results of a run that diverged: what happened. It has results, and has not finished.
STOPPED = "stopped"


def has_finished(folder: str | Path) -> bool:
    """Whether the run in ``folder`` has come to its end: results are written when it has, or when it diverges.

    Raises:
        ValueError: its results are damaged.
    """
    path = Path(folder) / RESULTS_FILE
    return path.is_file() and STOPPED not in read_json(path)
