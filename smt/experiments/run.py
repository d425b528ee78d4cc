"""Train the cells of a study, one after the other or several at once; what is finished is not run again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from smt.experiments.cell import CELL_FILE, FAILURE_FILE, attempt
from smt.experiments.settings import Cell, Study
from smt.runtime.fields import differences
from smt.runtime.files import check_folder, write_files
from smt.runtime.process import signals_held
from smt.training.run_files import LOCK_FILE, has_finished
from smt.training.settings import RunConfig

OUTPUT_FILE = "output.txt"
# The process of a cell imports what this one imports: neither -m nor -c, which look into the current folder first, would.
START = """import importlib, sys
module, folder, *sys.path[:] = sys.argv[1:]
sys.exit(importlib.import_module(module).main(folder))"""
# What such a process does.
CELL_MODULE = "smt.experiments.cell"
# For a process that has been told to end, until it is killed.
SECONDS_TO_END = 10.0
# Between two looks at the processes that run.
SECONDS_TO_WAIT = 0.05


@dataclass(frozen=True)
class CellOutcome:
    """How a cell ended.

    Attributes:
        cell: which.
        folder: where its run is.
        error: why it failed; None: it did not.
    """

    cell: Cell
    folder: Path
    error: str | None = None


def run_study(
    study: Study, out: str | Path = "results", *, jobs: int = 1, tell: Callable[[str], None] = print
) -> list[CellOutcome]:
    """Run every cell in ``<out>/<study>/<label>/``; a cell that fails does not stop the others.

    Args:
        jobs: cells that train at once, each in a process of its own with its share of the cores; what they print goes into
            ``output.txt`` of their folders. 1: one after the other, in this process.
        tell: is given a line when a cell begins and when it ends.

    Raises:
        ValueError: ``jobs`` below 1, or a folder with another configuration than the study's; nothing is run then.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    check_folder(Path(out) / study.name)
    folders = {cell.label: Path(out) / study.name / cell.label for cell in study.cells}
    for cell in study.cells:
        _check_same(cell, folders[cell.label])
    place = {cell.label: f"[{index}/{len(study.cells)}] {cell.label}" for index, cell in enumerate(study.cells, 1)}
    begun: dict[Path, tuple[Cell, float]] = {}
    outcomes: dict[str, CellOutcome] = {}

    def to_attempt() -> Iterator[Path]:
        for cell in study.cells:
            folder = folders[cell.label]
            if has_finished(folder):
                tell(f"{place[cell.label]}: finished before, not run again")
                outcomes[cell.label] = CellOutcome(cell, folder)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FAILURE_FILE).unlink(missing_ok=True)
            write_files({folder / CELL_FILE: cell.config.anchored().to_yaml})
            tell(f"{place[cell.label]}: begins" + (f", output in {folder / OUTPUT_FILE}" if jobs > 1 else ""))
            begun[folder] = cell, time.perf_counter()
            yield folder

    def attempt_here() -> Iterator[tuple[Path, str | None]]:
        for folder in to_attempt():
            yield folder, attempt(folder)

    with closing(attempt_here() if jobs == 1 else attempt_apart(to_attempt(), jobs)) as attempts:
        for folder, error in attempts:
            cell, started = begun[folder]
            seconds = f"{time.perf_counter() - started:.0f} s"
            ended = "finished in" if error is None else f"failed, see {folder / FAILURE_FILE}, after"
            tell(f"{place[cell.label]}: {ended} {seconds}")
            outcomes[cell.label] = CellOutcome(cell, folder, error)
    return [outcomes[cell.label] for cell in study.cells]


def _check_same(cell: Cell, folder: Path) -> None:
    """Raise ValueError if the folder holds anything of a run of another configuration."""
    left = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not left - {CELL_FILE, FAILURE_FILE, OUTPUT_FILE, LOCK_FILE}:
        return
    if CELL_FILE not in left:
        raise ValueError(f"{folder} holds something else than a cell of a study; give the study another --name or --out")
    there, config = RunConfig.from_yaml(folder / CELL_FILE).anchored(), cell.config.anchored()
    if there == config:
        return
    differing = differences(there.flat(), config.flat())
    raise ValueError(f"{folder} was run with {differing}; give the study another --name or --out, or remove that folder")


def attempt_apart(folders: Iterable[Path], jobs: int, module: str = CELL_MODULE) -> Iterator[tuple[Path, str | None]]:
    """As ``attempt``, of each folder in a process of its own, whose end is no end of this one; folders and errors as they end.

    Args:
        folders: of cells, in which their processes leave what they say; each is asked for when its process is to begin.
        jobs: processes that run at once, and share the threads. All are ended when the generator is left early.
        module: whose ``main`` the processes run.
    """
    waiting, running = iter(folders), dict[Path, subprocess.Popen]()
    try:
        while True:
            for folder in islice(waiting, jobs - len(running)):
                with signals_held():
                    running[folder] = _begin(folder, jobs, module)
            if not running:
                return
            # Not one long wait, nor one of threads: a signal that comes just before it does not interrupt it.
            time.sleep(SECONDS_TO_WAIT)
            for folder, process in list(running.items()):
                if process.poll() is not None:
                    del running[folder]
                    process.stdin.close()
                    yield folder, _error(folder, process.returncode)
    finally:
        _end(running.values())


def _begin(folder: Path, jobs: int, module: str) -> subprocess.Popen:
    """A process that works on a cell; its standard input is closed when this process ends, even by a signal."""
    threads = str(max(1, cores() // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, "-c", START, module, str(folder), *sys.path]
    with (folder / OUTPUT_FILE).open("w", encoding="utf-8") as output:
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output)


def _error(folder: Path, code: int) -> str | None:
    """Why the process of a cell failed; None: it did not."""
    if code == 0:
        return None
    if code == 1 and (folder / FAILURE_FILE).is_file():
        return (folder / FAILURE_FILE).read_text(encoding="utf-8").splitlines()[-1]
    return f"the process ended by signal {-code}" if code < 0 else f"the process ended with exit code {code}"


def _end(processes: Collection[subprocess.Popen]) -> None:
    """End all, by force where one takes too long."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_END
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdin.close()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
