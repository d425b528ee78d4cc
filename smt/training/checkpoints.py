"""Checkpoints from which a run goes on exactly: weights, optimiser, memory, random numbers, and where everything stood.

    checkpoints/step_00000500/
        config.yaml, tokenizer.json, model.safetensors    a checkpoint as any other (``smt.model.checkpoint``)
        optimizer.safetensors  AdamW's moments, by the names of the parameters
        rank_0.safetensors     of each process: the memory of its rows and its random numbers
        progress.json          counts, losses, the clock and the place in the documents

A checkpoint is written into a folder of another name, which is renamed when all of it is on the disk: what is called ``step_``
and a number is complete, whenever the run was killed. Whatever else lies beside them, such as a copy of one under another name,
is left alone. Names are the model's own, and weights are gathered whole: a run goes on with as many processes, sharded or not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from smt.data.tokenizer import TOKENIZER_FILES
from smt.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from smt.runtime.files import (
    PARTIAL,
    errors_of,
    read_json,
    read_safetensors,
    sync,
    tensors_writer,
    text_writer,
    write_files,
)

FOLDER, PREFIX, OLD = "checkpoints", "step_", ".old"
COMPLETE = re.compile(rf"{PREFIX}(\d{{8,}})")
INCOMPLETE = re.compile(rf"{PREFIX}\d{{8,}}({re.escape(OLD)})?{re.escape(PARTIAL)}")
OPTIMIZER_FILE, PROGRESS_FILE = "optimizer.safetensors", "progress.json"


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
        """Write the checkpoint of ``step``, then remove those that are too many.

        Raises:
            OSError: it cannot be written, such as on a full disk; nothing of it is left.
        """
        final = self.folder / f"{PREFIX}{step:08d}"
        unfinished = final.with_name(final.name + PARTIAL)
        if self._rank == 0:
            self._remove(unfinished)  # of a run that was killed here
            with errors_of(unfinished):
                unfinished.mkdir(parents=True)
        self._wait()
        try:
            write_files({unfinished / _rank_file(self._rank): tensors_writer(snapshot.of_rank)})
            if self._rank == 0:
                self._write_shared(unfinished, snapshot)
        except BaseException:
            self._remove(unfinished)
            raise
        self._wait()
        if self._rank == 0:
            self._remove(final)  # of a run that went on from an earlier one
            with errors_of(final):
                os.replace(unfinished, final)
            sync(self.folder)
            for old in self._complete()[: -self._limit]:
                self._remove(old)
        self._wait()

    def _write_shared(self, folder: Path, snapshot: Snapshot) -> None:
        copied = [path for name in (CONFIG_FILE, *TOKENIZER_FILES) if (path := self._run / name).is_file()]
        write_files(
            {
                folder / WEIGHTS_FILE: tensors_writer(snapshot.weights),
                folder / OPTIMIZER_FILE: tensors_writer(snapshot.optimizer),
                folder / PROGRESS_FILE: text_writer(json.dumps(snapshot.progress)),
                **{folder / path.name: partial(shutil.copyfile, path) for path in copied},
            }
        )

    @property
    def newest_step(self) -> int | None:
        """Of the checkpoint to go on from; None: there is none."""
        complete = self._complete()
        return int(complete[-1].name.removeprefix(PREFIX)) if complete else None

    def newest(self) -> Snapshot | None:
        """The checkpoint to go on from, as this process needs it; None: there is none.

        Raises:
            ValueError: it was written by fewer processes, or a file is damaged.
        """
        complete = self._complete()
        if not complete:
            return None
        folder = complete[-1]
        of_rank = folder / _rank_file(self._rank)
        if not of_rank.is_file():
            count = len(list(folder.glob(_rank_file("*"))))
            raise ValueError(f"{folder} is of {count} processes, this is process {self._rank + 1}: resume with as many")
        progress = read_json(folder / PROGRESS_FILE)
        return Snapshot(*(read_safetensors(folder / name) for name in (WEIGHTS_FILE, OPTIMIZER_FILE, of_rank.name)), progress)

    def finish(self) -> None:
        """Of a run that is over, keep the models; what only resuming needs is larger."""
        if self._rank != 0 or not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            if INCOMPLETE.fullmatch(path.name):
                self._remove(path)
        for folder in self._complete():
            for path in folder.iterdir():
                if path.name in (OPTIMIZER_FILE, PROGRESS_FILE) or path.match(_rank_file("*")):
                    path.unlink()

    def _complete(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        found = [(int(match[1]), path) for path in there if (match := COMPLETE.fullmatch(path.name)) and path.is_dir()]
        return [path for _, path in sorted(found)]

    def _remove(self, folder: Path) -> None:
        """Delete a folder, under the name of an incomplete one, so that no half of it is taken for a checkpoint."""
        if folder.suffix != PARTIAL and folder.is_dir():
            old = folder.with_name(f"{folder.name}{OLD}{PARTIAL}")
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed while it did this
            folder = folder.rename(old)
        shutil.rmtree(folder, ignore_errors=True)


def _rank_file(rank: int | str) -> str:
    return f"rank_{rank}.safetensors"
