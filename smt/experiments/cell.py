"""One cell of a study: ``python -m smt.experiments.cell FOLDER`` trains what ``cell.yaml`` in the folder says, in that folder.

``cell.yaml`` is the configuration that was asked for. What the run itself records in ``config.yaml`` may differ from it: a
trained tokenizer can end with fewer tokens, and weights to start from bring their own.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from smt.runtime.streams import standard_streams
from smt.training.run import run_in
from smt.training.settings import RunConfig

CELL_FILE, FAILURE_FILE = "cell.yaml", "failure.txt"


def attempt(folder: Path) -> str | None:
    """Train in ``folder``; an error is left in ``failure.txt`` with its traceback, and its message returned."""
    try:
        run_in(folder, RunConfig.from_yaml(folder / CELL_FILE))
    except Exception as error:
        # The message last and in one line, where it is looked for.
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        (folder / FAILURE_FILE).write_text(f"{traceback.format_exc()}\n{message}\n", encoding="utf-8")
        return message
    return None


if __name__ == "__main__":
    with standard_streams(results_in_files=True):
        failure = attempt(Path(sys.argv[1]))
    sys.exit(0 if failure is None else 1)
