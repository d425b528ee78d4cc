"""Everything that a study has found, in one JSON, from which its tables, plots and report are made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from smt.data.held_out import HeldOut
from smt.hymba.config import HymbaConfig
from smt.model.checkpoint import CONFIG_FILE
from smt.runtime.device import find_device
from smt.runtime.environment import environment
from smt.runtime.files import read_json, text_writer, write_files
from smt.study.cell import EQUAL_TIME, ORPO, TRAINING, measured_file
from smt.study.measure import LONG, counted_bytes
from smt.study.prepared import Prepared
from smt.study.rates import tried_rates
from smt.study.run import StudyCell
from smt.study.sharing import sharing
from smt.training.progress import History
from smt.training.settings import RunConfig

STUDY_FILE = "study.json"
STAGES = (TRAINING, EQUAL_TIME, ORPO)


def record(prepared: Prepared, cells: Sequence[StudyCell], command: str) -> dict[str, Any]:
    """What the cells have left so far, and what it was measured on."""
    settings, text = prepared.settings, prepared.text
    device = find_device(settings.run.get("training", {}).get("device", "auto"))
    held_out = HeldOut.of(text.validation, prepared.first_stage.data.eval_documents)
    return {
        "command": command,
        "environment": environment(device),
        "settings": json.loads(json.dumps(asdict(settings))),
        "stages": _stages(prepared, cells),
        "learning_rates": {
            model: {f"{rate:g}": loss for rate, loss in losses.items()} for model, losses in tried_rates(prepared).items()
        },
        "text": {
            "source": text.source,
            "vocabulary": text.tokenizer.vocab_size,
            "training": {"documents": len(text.train), "tokens": text.train.n_targets, "bytes": sum(text.train.n_bytes)},
            "held_out": {
                "documents": len(held_out.documents),
                "tokens": held_out.n_targets,
                "bytes": held_out.n_bytes,
            },
        },
        "models": {
            name: {
                "architecture": sized.architecture,
                "parameters": sized.parameters,
                "embedding": sized.embedding,
                "config": sized.config.to_dict(),
                f"bytes_at_{LONG}": counted_bytes(sized.config, LONG),
            }
            for name, sized in prepared.models.items()
        },
        "sharing": {
            "documents": sharing(HymbaConfig(), settings.context),
            "own": [row for config in _hymbas(prepared)[:1] for row in sharing(config, settings.context, measure=True)],
        },
        "runs": [run for cell in cells for run in _runs(cell)],
        "failures": {cell.label: cell.error for cell in cells if cell.error is not None},
    }


def _stages(prepared: Prepared, cells: Sequence[StudyCell]) -> dict[str, dict[str, Any] | None]:
    """How long and at which rate both stages train, and on what; of the second None where no run has come to it."""
    ran = (cell.folder / ORPO for cell in cells if measured_file(cell.folder, ORPO).is_file())
    second = next((RunConfig.from_yaml(folder / CONFIG_FILE) for folder in ran), None)
    return {TRAINING: _told(prepared.first_stage), ORPO: None if second is None else _told(second)}


def _told(config: RunConfig) -> dict[str, Any]:
    training, data = config.training, config.data
    return {
        **{name: getattr(training, name) for name in ("steps", "learning_rate", "weight_decay", "warmup", "orpo_lambda")},
        **{name: getattr(data, name) for name in ("batch_size", "chunk_length")},
    }


def _hymbas(prepared: Prepared) -> list[HymbaConfig]:
    """The sizes of the layouts of a study, side by side."""
    configs = (sized.config for sized in prepared.models.values())
    return [replace(config, layout="parallel") for config in configs if isinstance(config, HymbaConfig)]


def _runs(cell: StudyCell) -> list[dict[str, Any]]:
    """What was measured after each stage of a cell, with the losses on the way."""
    runs = []
    for stage in STAGES:
        path = measured_file(cell.folder, stage)
        if path.is_file():
            losses = History.read(cell.folder / stage)
            curve = {"steps": losses.train_steps, "losses": losses.train_loss}
            runs.append({"model": cell.model, "seed": cell.seed, "stage": stage, **read_json(path), "curve": curve})
    return runs


def save(study: dict[str, Any], folder: Path) -> Path:
    """Write ``study.json``."""
    path = folder / STUDY_FILE
    folder.mkdir(parents=True, exist_ok=True)
    write_files({path: text_writer(json.dumps(study, indent=1, allow_nan=False) + "\n")})
    return path
