"""Every figure that matters on a GPU, in minutes: training steps, attention, the loss, the memory, host cost, decoding.

    python benchmarks/bench_card.py --minutes 5 --json card.json --markdown card.md

Sections come in order of worth. Whatever has been measured is written after each case, so that nothing is lost when time runs
out or the device fails. Ratios are to the first case of the same section and shape, measured in the same process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from card_cases import Suite, gpt2_small, release
from card_clock import ceilings
from card_rows import Row
from report import print_machine

from smt.runtime.environment import environment
from smt.runtime.process import keep_freed_memory

FAILURE = 160  # letters of an error that a row shows
NOT_INSTALLED = "not installed: "
COLUMNS = ("case", "shape", "time", "host", "kernels", "tokens/s", "peak", "ratio", "")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="no case begins after these (default: 5)")
    parser.add_argument("--only", help="comma-separated beginnings of sections to measure")
    parser.add_argument("--json", type=Path, help="write rows, ceilings and environment, after every case")
    parser.add_argument("--markdown", type=Path, help="the same as a report")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "bench_card.py measures CUDA devices, and there is none here; on a CPU: benchmarks/bench_window.py", file=sys.stderr
        )
        return 1
    keep_freed_memory()  # as the command line does: the thread of the backward pass takes memory as fast as any
    device = torch.device("cuda", torch.cuda.current_device())
    suite = Suite(gpt2_small(), device)
    rows = run(suite, deadline=time.monotonic() + 60 * options.minutes, options=options)
    return 1 if any(row.seconds is None and not row.note.startswith(NOT_INSTALLED) for row in rows) else 0


def run(suite: Suite, deadline: float, options: argparse.Namespace) -> list[Row]:
    """The rows of all cases that begin before ``deadline`` (``time.monotonic``)."""
    document = {"environment": environment(suite.device), "ceilings": ceilings(suite.device)}
    print_machine(document["environment"])
    print(ceilings_line(document["ceilings"]), flush=True)
    rows: list[Row] = []
    for case in suite.cases():
        if options.only and not case.section.startswith(tuple(options.only.split(","))):
            continue
        if time.monotonic() > deadline:
            print("the time is up")
            break
        torch.manual_seed(0)
        try:
            row = case.row()
        except ModuleNotFoundError as error:  # mamba-ssm, which few have
            row = Row(case.section, case.name, case.shape, note=f"{NOT_INSTALLED}{str(error.name).partition('.')[0]}")
        except Exception as error:  # one case that fails, or does not fit the memory, costs its row alone
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:FAILURE]
            row = Row(case.section, case.name, case.shape, note=reason)
        rows.append(with_ratio(row, rows))
        print(line(rows[-1]), flush=True)
        release(suite.device)
        document["rows"] = [dataclasses.asdict(row) for row in rows]
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if options.markdown:
            options.markdown.write_text(as_markdown(document), encoding="utf-8")
    return rows


def with_ratio(row: Row, before: list[Row]) -> Row:
    """``row``, with its ratio to the first of its section and shape."""
    baseline = next((other for other in before if (other.section, other.shape) == (row.section, row.shape)), None)
    if baseline is None or baseline.seconds is None or row.seconds is None:
        return row
    return dataclasses.replace(row, ratio=baseline.seconds / row.seconds)


def line(row: Row) -> str:
    """One row, as it is printed."""
    return "  ".join((row.section, row.case, row.shape, *as_cells(row)))


def as_cells(row: Row) -> list[str]:
    """Time, host, kernels, tokens per second, memory, ratio and note of a row, as its tables show them."""
    if row.seconds is None:
        return ["not measured", "", "", "", "", "", row.note]
    return [
        f"{row.seconds * 1e3:,.3f} ms",
        *("" if of is None else f"{of * 1e3:,.3f} ms" for of in (row.host_seconds, row.kernel_seconds)),
        "" if row.tokens is None else f"{row.tokens / row.seconds:,.0f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f} GiB",
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        row.note,
    ]


def ceilings_line(measured: dict[str, float]) -> str:
    """The ceilings in words."""
    return (
        f"copy {measured['copy'] / 1e12:.2f} TB/s (read and written), matmul {measured['product'] / 1e12:.0f} TFLOP/s "
        "(8,192 cubed, bf16), measured in the same run"
    )


def as_markdown(document: dict) -> str:
    """A report: what it was measured on, and a table for each section."""
    lines = ["# Measured on a GPU", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in document["environment"].items()]
    lines += [f"| ceilings | {ceilings_line(document['ceilings'])} |"]
    rows = [Row(**row) for row in document["rows"]]
    for section in dict.fromkeys(row.section for row in rows):
        lines += ["", f"## {section}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join((row.case, row.shape, *as_cells(row)))} |" for row in rows if row.section == section]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
