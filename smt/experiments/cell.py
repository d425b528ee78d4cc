"""One cell of a study: ``train`` does what ``cell.yaml`` in a folder says, in that folder; ``main`` does in a process.

``cell.yaml`` is the configuration that was asked for. What the run itself records in ``config.yaml`` may differ from it: a
trained tokenizer can end with fewer tokens, and weights to start from bring their own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from smt.runtime.streams import standard_streams
from smt.training.run import run_in
from smt.training.settings import RunConfig

CELL_FILE, FAILURE_FILE = "cell.yaml", "failure.txt"


def train(folder: Path) -> None:
    """Train in ``folder``."""
    run_in(folder, RunConfig.from_yaml(folder / CELL_FILE))


def attempt(folder: Path, work: Callable[[Path], None] = train) -> str | None:
    """Do the work of a cell; an error is left in ``failure.txt`` with its traceback, and its message returned."""
    try:
        work(folder)
    except Exception as error:
        # The message last and in one line, where it is looked for.
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        (folder / FAILURE_FILE).write_text(f"{traceback.format_exc()}\n{message}\n", encoding="utf-8")
        return message
    return None


def main(folder: str, work: Callable[[Path], None] = train) -> int:
    """Attempt a cell in a process that ends with the one that began it, however that ends; returns the exit code."""
    threading.Thread(target=_end_with_parent, args=(sys.stdin,), daemon=True).start()
    with standard_streams(results_in_files=True):
        failure = attempt(Path(folder), work)
    return 0 if failure is None else 1


def _end_with_parent(pipe: TextIO) -> None:
    # Nothing is written to it; it ends when the parent does. Not by its own read, whose lock a process cannot end without.
    os.read(pipe.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)
