"""The folder that a run leaves, usually ``<out>/<experiment>/YYYYMMDD_HHMMSS/``."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from smt.checkpoint import CONFIG_FILE, WEIGHTS_FILE, weights_writer, write_files
from smt.training.settings import RunConfig


@dataclass
class History:
    """Losses over the run, by optimiser step."""

    train_loss: list[float] = field(default_factory=list)
    train_steps: list[int] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_ppl: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)


class RunFolder:
    """Paths and writers of one run, a checkpoint among them (``smt.checkpoint``); no file is ever half there."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.weights = self.path / WEIGHTS_FILE
        self.curves = self.path / "training_curves.png"
        write_files({self.path / CONFIG_FILE: config.to_yaml})

    def save_weights(self, model: torch.nn.Module) -> None:
        """Write the parameters as safetensors."""
        write_files({self.weights: weights_writer(model)})

    def save_history(self, history: History) -> None:
        """Write ``metrics_history.json``."""
        self._save_json("metrics_history.json", asdict(history))

    def save_results(self, config: RunConfig, results: dict[str, Any], device: torch.device) -> None:
        """Write ``results.json``: the configuration, the results and where they were obtained."""
        self._save_json("results.json", {**config.to_dict(), "results": results, "environment": environment(device)})

    def _save_json(self, name: str, values: dict[str, Any]) -> None:
        text = json.dumps(values, indent=2) + "\n"
        write_files({self.path / name: lambda path: path.write_text(text, encoding="utf-8")})


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides its code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def new_folder(parent: Path) -> Path:
    """A folder named by the time; runs of the same second wait for the next."""
    while True:
        path = parent / datetime.now().strftime("%Y%m%d_%H%M%S")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            time.sleep(0.2)
