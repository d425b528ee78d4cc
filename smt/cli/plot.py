"""``smt plot``: the training curves of runs, drawn again from what they recorded."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

EXAMPLES = """\
  smt plot results/stdlib/20260101_120000              draws its training_curves.png again
  smt plot results/stdlib/20260101_120000 --out a.png
  smt plot results/stdlib/* --out stdlib.png           the runs in one figure"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``smt plot``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that smt train left")
    parser.add_argument("--out", metavar="FILE", help="of the plot (default for one run: training_curves.png in its folder)")


def run(options: argparse.Namespace, started: float) -> int:
    """Draw, and say where."""
    if len(options.runs) > 1 and options.out is None:
        raise ValueError("smt plot needs --out FILE to draw several runs in one figure")
    from smt.experiments.record import RunRecord, named
    from smt.runtime.files import check_folder, write_files
    from smt.training import plots
    from smt.training.progress import History
    from smt.training.run_files import has_finished

    histories = {name: History.read(folder) for name, folder in named(options.runs).items()}
    out = Path(options.out or Path(options.runs[0]) / "training_curves.png")
    check_folder(out.parent, f"the folder of {out}").mkdir(parents=True, exist_ok=True)
    if len(histories) > 1:
        write_files({out: partial(plots.curves_of_runs, histories)})
    else:
        ((name, history),) = histories.items()
        if has_finished(options.runs[0]):
            record = RunRecord.read(options.runs[0])
            name = f"{record.experiment}: {record.bits_per_byte:.3f} bits per byte"
        write_files({out: partial(plots.training_curves, history, title=name)})
    print(f"files           {out}")
    return 0
