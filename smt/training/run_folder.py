"""The folder that a run leaves: ``<out>/<experiment>/YYYYMMDD_HHMMSS/``."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smt.data.tokenized import TokenizedCorpus
from smt.evaluation.text import TEXT_FILE, text_of_run
from smt.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from smt.runtime.environment import environment
from smt.runtime.files import check_folder, remove_partial, tensors_writer, text_writer, write_files
from smt.training.progress import History
from smt.training.run_files import (
    CURVES_FILE,
    HISTORY_FILE,
    LOCK_FILE,
    RESULTS_FILE,
    STOPPED,
    has_finished,
)
from smt.training.settings import RunConfig

if TYPE_CHECKING:
    from filelock import BaseFileLock


WRITTEN = (CONFIG_FILE, WEIGHTS_FILE, RESULTS_FILE, HISTORY_FILE, TEXT_FILE, CURVES_FILE)


class RunFolder:
    """Paths and writers of one run, a checkpoint among them (``smt.model.checkpoint``); no file is ever half there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.curves = path / CURVES_FILE
        self._lock: BaseFileLock | None = None

    @property
    def is_finished(self) -> bool:
        """Whether its run has come to its end, and has not stopped because it diverged."""
        return has_finished(self.path)

    def lock(self) -> None:
        """Keep other processes from training here until ``unlock``, or until this process ends, however it does.

        Raises:
            ValueError: another one trains here.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process is training the run in {self.path}") from None
        self._lock = lock
        remove_partial(self.path / name for name in WRITTEN)

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is None:
            return
        if self.is_finished:  # else one who waits to go on would hold a lock that the next one does not see
            (self.path / LOCK_FILE).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None

    def save_config(self, config: RunConfig) -> None:
        """Write ``config.yaml``."""
        write_files({self.path / CONFIG_FILE: config.to_yaml})

    def save_weights(self, weights: dict[str, Tensor]) -> None:
        """Write ``model.safetensors``."""
        write_files({self.path / WEIGHTS_FILE: tensors_writer(weights)})

    def save_history(self, history: History) -> None:
        """Write ``metrics_history.json``."""
        self._save_json(HISTORY_FILE, history.to_dict())

    def save_results(
        self, config: RunConfig, results: dict[str, Any], device: torch.device, *, stopped: str | None = None
    ) -> None:
        """Write ``results.json``: the configuration, the results, where they were obtained, and why the run has ``stopped``."""
        more = {} if stopped is None else {STOPPED: stopped}
        self._save_json(RESULTS_FILE, {**config.to_dict(), "results": results, "environment": environment(device), **more})

    def save_text(self, text: TokenizedCorpus) -> None:
        """Write ``text.json``: what the run reads, by hashes of all names and texts."""
        hashes = {"training": text.train.text_hash, "held_out": text.validation.text_hash}
        self._save_json(TEXT_FILE, {"source": text.source, **hashes})

    def check_text(self, text: TokenizedCorpus) -> str | None:
        """A warning if the training text is not that of ``text.json``, where there is one.

        Raises:
            ValueError: nor is the held-out text.
        """
        there = text_of_run(self.path)
        if there.get("held_out", text.validation.text_hash) != text.validation.text_hash:
            raise ValueError(
                f"the held-out text of {text.source} is not that with which the run in {self.path} began: its losses would not "
                "compare. Put that text back, or begin a new run"
            )
        if there.get("training", text.train.text_hash) == text.train.text_hash:
            return None
        return f"the training text of {text.source} is not that with which the run in {self.path} began"

    def _save_json(self, name: str, values: dict[str, Any]) -> None:
        write_files({self.path / name: text_writer(json.dumps(values, indent=2) + "\n")})


def new_folder(out: str | Path, experiment: str) -> Path:
    """A folder named by the time, below ``<out>/<experiment>``; runs of the same second wait for the next."""
    runs = check_folder(Path(out) / experiment)
    runs.mkdir(parents=True, exist_ok=True)
    while True:
        path = runs / datetime.now().strftime("%Y%m%d_%H%M%S")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            time.sleep(0.2)
