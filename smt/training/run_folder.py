"""The folder that a run leaves: ``<out>/<experiment>/YYYYMMDD_HHMMSS/``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smt.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from smt.runtime.environment import environment
from smt.runtime.files import tensors_writer, write_files
from smt.training.progress import History
from smt.training.settings import RunConfig

RESULTS_FILE, HISTORY_FILE, CURVES_FILE = "results.json", "metrics_history.json", "training_curves.png"


class RunFolder:
    """Paths and writers of one run, a checkpoint among them (``smt.model.checkpoint``); no file is ever half there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.curves = path / CURVES_FILE

    @property
    def is_finished(self) -> bool:
        """Whether its run has come to its end: results are written last."""
        return (self.path / RESULTS_FILE).is_file()

    def save_config(self, config: RunConfig) -> None:
        """Write ``config.yaml``."""
        write_files({self.path / CONFIG_FILE: config.to_yaml})

    def save_weights(self, weights: dict[str, Tensor]) -> None:
        """Write ``model.safetensors``."""
        write_files({self.path / WEIGHTS_FILE: tensors_writer(weights)})

    def save_history(self, history: History) -> None:
        """Write ``metrics_history.json``."""
        self._save_json(HISTORY_FILE, asdict(history))

    def save_results(self, config: RunConfig, results: dict[str, Any], device: torch.device) -> None:
        """Write ``results.json``: the configuration, the results and where they were obtained."""
        self._save_json(RESULTS_FILE, {**config.to_dict(), "results": results, "environment": environment(device)})

    def _save_json(self, name: str, values: dict[str, Any]) -> None:
        text = json.dumps(values, indent=2) + "\n"
        write_files({self.path / name: lambda path: path.write_text(text, encoding="utf-8")})


def new_folder(out: str | Path, experiment: str) -> Path:
    """A folder named by the time, below ``<out>/<experiment>``; runs of the same second wait for the next."""
    while True:
        path = Path(out) / experiment / datetime.now().strftime("%Y%m%d_%H%M%S")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            time.sleep(0.2)
