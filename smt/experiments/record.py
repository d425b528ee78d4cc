"""A finished run, as its folder tells it: what it was, what came of it, and how its losses went. Needs no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smt.data.tokenizer import TOKENIZER_FILE
from smt.runtime.files import read_json
from smt.training.progress import History
from smt.training.run_files import RESULTS_FILE, STOPPED


class UnfinishedRunError(ValueError):
    """A folder without the results of a run."""


@dataclass(frozen=True)
class RunRecord:
    """What is compared between runs.

    Attributes:
        name: how tables and plots call it.
        folder: where it is.
        experiment: its name.
        encoding: of the window; of another architecture its name, and where it has several its layout.
        pool_source: what a write pools; None where nothing is written.
        parameters: of the model.
        steps, tokens: of its training.
        bits_per_byte, perplexity: of the final weights, on the held-out documents.
        best_loss: the lowest held-out loss of an evaluation.
        tokens_per_second: of its training.
        held_out: what tells held-out texts apart.
        tokenizer: what tells tokenizers apart.
        history: its losses.
    """

    name: str
    folder: Path
    experiment: str
    encoding: str
    pool_source: str | None
    parameters: int
    steps: int
    tokens: int
    bits_per_byte: float
    perplexity: float
    best_loss: float
    tokens_per_second: float
    held_out: str
    tokenizer: str
    history: History

    @classmethod
    def read(cls, folder: str | Path, name: str | None = None) -> RunRecord:
        """The run in ``folder``.

        Raises:
            UnfinishedRunError: it has no ``results.json``, or one that says that the run diverged.
            ValueError: a file that is damaged or not of a run.
        """
        folder = Path(folder)
        if not (folder / RESULTS_FILE).is_file():
            raise UnfinishedRunError(f"{folder} has no {RESULTS_FILE}: the run is not finished, or it is the folder of none")
        values = read_json(folder / RESULTS_FILE)
        if STOPPED in values:
            raise UnfinishedRunError(f"{folder} stopped before its end: {values[STOPPED]}")
        try:
            model, results = values["model"], values["results"]
            architecture = values.get("architecture", "smt")
            ours = architecture == "smt"
            data = values["data"]
            return cls(
                name=name or folder.name,
                folder=folder,
                experiment=values["experiment"],
                encoding=model["encoding"] if ours else " ".join([architecture, *filter(None, [model.get("layout")])]),
                pool_source=model["pool_source"] if ours and model["writes"] else None,
                parameters=results["parameters"],
                steps=results["steps"],
                tokens=results["train_tokens"],
                bits_per_byte=results["val_bits_per_byte"],
                perplexity=results["final_val_ppl"],
                best_loss=results["best_val_loss"],
                tokens_per_second=results["tokens_per_second"],
                held_out=f"{results['val_bytes']} bytes of {data['source']} {data.get('recall') or ''}".strip(),
                tokenizer=_tokenizer(folder),
                history=History.read(folder),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / RESULTS_FILE} is not that of a run: {error!r}") from error


def named(folders: Sequence[str | Path]) -> dict[str, Path]:
    """The folders by name: their paths below the last folder that all have in common; a single one by its own name.

    Raises:
        ValueError: a folder that is given twice.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"runs must be different folders, {folder} is there {paths.count(path)} times")
    common = os.path.commonpath([path.parent for path in paths])
    return {Path(os.path.relpath(path, common)).as_posix(): Path(folder) for path, folder in zip(paths, folders, strict=True)}


def read_records(folders: Sequence[str | Path]) -> tuple[list[RunRecord], list[str]]:
    """The finished runs among ``folders``, and a line for each that is not finished.

    Raises:
        ValueError: a folder that is given twice, or a damaged file.
    """
    records, unfinished = [], []
    for name, folder in named(folders).items():
        try:
            records.append(RunRecord.read(folder, name))
        except UnfinishedRunError as error:
            unfinished.append(str(error))
    return records, unfinished


def _tokenizer(folder: Path) -> str:
    path = folder / TOKENIZER_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
