"""``smt compare``: finished runs in one table and one plot."""

from __future__ import annotations

import argparse
import sys

EXAMPLES = """\
  smt compare results/stdlib/*                         a table of every run of an experiment
  smt compare results/stdlib/* results/novels/* --out comparison
  smt compare results/stdlib/* --json > runs.json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``smt compare``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that smt train left")
    parser.add_argument("--out", metavar="FOLDER", help="for the plot and the table as Markdown, CSV and JSON (default: none)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")


def run(options: argparse.Namespace, started: float) -> int:
    """Print the table, and leave it and its plot in a folder if there is to be one."""
    from smt.experiments.comparison import Comparison
    from smt.experiments.record import read_records

    records, unfinished = read_records(options.runs)
    for line in unfinished:
        print(f"smt: warning: {line}; left out", file=sys.stderr)
    if not records:
        raise ValueError("smt compare needs a finished run, and there is none among those given")
    compared = Comparison.of(records)
    print(compared.json() if options.json else compared.text(), end="" if options.json else "\n")
    if options.out is not None:
        files = compared.save(options.out, "comparison")
        # Beside JSON, standard output holds nothing else.
        print(f"\nfiles           {', '.join(map(str, files))}", file=sys.stderr if options.json else sys.stdout)
    return 0
