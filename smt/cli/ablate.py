"""``smt ablate``: runs of the variants of one configuration, and what the variants change."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from smt.cli.run_fields import USUAL_CONFIG, add_run_fields, overrides
from smt.runtime.process import Interrupted

EXAMPLES = """\
  smt ablate --grid stride=8,16,32                     a run for each stride, all else as in smt train
  smt ablate --grid stride=8,16 encoding=stride,stream --steps 500 --jobs 2
  smt ablate --grid pool_source=window,tokens seed=1,2,3 --control pool_source=window,seed=1
  smt ablate --study switches --control ours           a packaged study: each switch of the published model by itself
  smt ablate --study my_study.yaml --text my_novels/ --out results
the same command again runs only what has not finished"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``smt ablate``."""
    cells = parser.add_mutually_exclusive_group(required=True)
    cells.add_argument("--grid", nargs="+", metavar="FIELD=A,B,...", help="every combination of values of fields of a run")
    cells.add_argument("--study", metavar="YAML", help="file or packaged name: base, variants, budgets and seeds")
    parser.add_argument(
        "--config",
        metavar="YAML",
        help=f"what is varied: file or packaged name (default: {USUAL_CONFIG}, or the study's base)",
    )
    parser.add_argument("--name", help="of the study's folder (default: the file's, or the experiment's and the fields')")
    parser.add_argument("--out", default="results", metavar="FOLDER", help="where studies are kept (default: results)")
    parser.add_argument("--control", metavar="LABEL", help="cell or variant that the others are compared with, token by token")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells that train at once (default: 1)")
    add_run_fields(parser)


def run(options: argparse.Namespace, started: float) -> int:
    """Run the cells, and print their table."""
    from smt.experiments.report import report_study
    from smt.experiments.run import run_study
    from smt.experiments.seeds import as_text
    from smt.experiments.settings import Study

    given = overrides(options)
    if options.study is not None:
        study = Study.from_yaml(options.study, given, base=options.config, name=options.name)
    else:
        study = Study.of_grid(options.config or USUAL_CONFIG, _axes(options.grid), given, name=options.name)
    if options.control is not None:
        for cell in study.cells:
            study.control_of(cell, options.control)  # a name that does not exist is found before the training, not after it
    folder = Path(options.out) / study.name
    try:
        outcomes = run_study(study, options.out, jobs=options.jobs, tell=partial(print, flush=True))
    except Interrupted as interrupt:
        raise Interrupted(interrupt.signal, f"the study is in {folder}: the same command goes on with it") from None
    print("\ncomparing the cells", flush=True)
    report = report_study(study, outcomes, options.control)
    if report.comparison is not None:
        print(f"\n{report.comparison.text()}", flush=True)
        if report.over_seeds:
            print(f"\n{as_text(report.over_seeds)}", flush=True)
        print(f"\nfiles           {', '.join(map(str, report.save(folder)))}")
    else:
        print("\n".join(f"{label} failed: {error}" for label, error in report.failures.items()))
    if report.failures:
        raise ValueError(f"{len(report.failures)} of {len(outcomes)} cells failed")
    return 0


def _axes(grid: list[str]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for axis in grid:
        field, equals, values = axis.partition("=")
        if not equals or not field or field in axes:
            raise ValueError(f"--grid takes FIELD=VALUE,VALUE once for each field, got {axis!r}")
        axes[field.replace("-", "_")] = [value for value in values.split(",") if value]
    return axes
