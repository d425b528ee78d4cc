"""Checkpoints from which a run goes on exactly: weights, optimiser, memory, random numbers, and where everything stood.

    checkpoints/step_00000500/
        config.yaml, tokenizer.json, model.safetensors    a checkpoint as any other (``smt.model.checkpoint``)
        optimizer.safetensors  AdamW's moments, by the names of the parameters
        rank_0.safetensors     of each process: the memory of its rows and its random numbers
        progress.json          counts, losses, the clock and the place in the documents

A checkpoint is written into a folder of another name, which is renamed when all of it is there: what is called ``step_...`` is
complete, whenever the run was killed. Names are the model's own, and weights are gathered whole, so that a run may go on with
other numbers of processes, sharded or not, wherever its rows still fit.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from smt.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from smt.runtime.files import read_safetensors, tensors_writer

FOLDER, PREFIX, PARTIAL = "checkpoints", "step_", ".partial"
OPTIMIZER_FILE, PROGRESS_FILE = "optimizer.safetensors", "progress.json"
TOKENIZER_FILES = "tokenizer*.json"


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds.

    Attributes:
        weights, optimizer: tensors that all processes share.
        of_rank: tensors of this process.
        progress: what JSON can hold.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    of_rank: dict[str, Tensor]
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run's folder.

    Args:
        run: the folder of the run.
        limit: how many are kept, the newest.
        rank: of this process; only the first writes what all share.
        wait: returns when all processes have called it.
    """

    def __init__(self, run: Path, *, limit: int, rank: int = 0, wait: Any = lambda: None) -> None:
        self._run, self.folder, self._limit, self._rank, self._wait = run, run / FOLDER, limit, rank, wait

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Write the checkpoint of ``step``, then remove those that are too many."""
        final = self.folder / f"{PREFIX}{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        if self._rank == 0:
            self._remove(partial)  # of a run that was killed here
            partial.mkdir(parents=True)
        self._wait()
        tensors_writer(snapshot.of_rank)(partial / _rank_file(self._rank))
        if self._rank == 0:
            tensors_writer(snapshot.weights)(partial / WEIGHTS_FILE)
            tensors_writer(snapshot.optimizer)(partial / OPTIMIZER_FILE)
            for path in [self._run / CONFIG_FILE, *self._run.glob(TOKENIZER_FILES)]:
                shutil.copy(path, partial)
            (partial / PROGRESS_FILE).write_text(json.dumps(snapshot.progress), encoding="utf-8")
        self._wait()
        if self._rank == 0:
            self._remove(final)  # of a run that went on from an earlier one
            os.replace(partial, final)
            for old in self._complete()[: -self._limit]:
                self._remove(old)
        self._wait()

    def newest(self) -> Snapshot | None:
        """The checkpoint to go on from, as this process needs it; None: there is none.

        Raises:
            ValueError: it was written by fewer processes.
        """
        complete = self._complete()
        if not complete:
            return None
        folder = complete[-1]
        of_rank = folder / _rank_file(self._rank)
        if not of_rank.is_file():
            count = len(list(folder.glob(_rank_file("*"))))
            raise ValueError(f"{folder} is of {count} processes, this is process {self._rank + 1}: resume with as many")
        progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        return Snapshot(*(read_safetensors(folder / name) for name in (WEIGHTS_FILE, OPTIMIZER_FILE, of_rank.name)), progress)

    def finish(self) -> None:
        """Of a run that is over, keep the models; what only resuming needs is larger."""
        if self._rank != 0 or not self.folder.is_dir():
            return
        for folder in self.folder.glob(f"{PREFIX}*{PARTIAL}"):
            self._remove(folder)
        for folder in self._complete():
            for path in folder.iterdir():
                if path.name in (OPTIMIZER_FILE, PROGRESS_FILE) or path.match(_rank_file("*")):
                    path.unlink()

    def _complete(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        found = [path for path in self.folder.glob(f"{PREFIX}*") if path.suffix != PARTIAL]
        return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))

    def _remove(self, folder: Path) -> None:
        """Delete a folder, under the name of an incomplete one, so that no half of it is taken for a checkpoint."""
        if folder.suffix != PARTIAL and folder.is_dir():
            folder = folder.rename(folder.with_name(f"{folder.name}.old{PARTIAL}"))
        shutil.rmtree(folder, ignore_errors=True)


def _rank_file(rank: int | str) -> str:
    return f"rank_{rank}.safetensors"
