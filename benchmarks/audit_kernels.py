"""What the compiler made of every Triton kernel, and what each call asks for, beside its budgets; needs no GPU.

    python benchmarks/audit_kernels.py --quick
    python benchmarks/audit_kernels.py --markdown --sizes 64,128 --targets sm_80,sm_90 > audit.md

Registers (per thread), spills, shared memory (KiB per program), occupancy and instructions on the matrix units come from
compiling the call ahead of time, one figure per launch; bytes requested over the least, FLOPs of dots over the useful ones and
launches from interpreting it on a small input. The times are predicted from these counts by a roofline and measured nowhere
(``roofline.py`` says how). Budgets stand in ``kernel_budgets.yaml``; the exit status is 1 if one is broken, unless triton is of
a version that they were not checked with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Bytes and FLOPs are counted in the interpreter, on a machine with a GPU too; compiling has processes of its own.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from roofline import BATCH, GPUS, HEADS, LAUNCH_SECONDS, LENGTH, full_attention_seconds, predicted_seconds

from smt.runtime.environment import environment
from smt.runtime.tables import aligned, markdown
from smt_kernels.testing.aot import TARGETS, compiler_version
from smt_kernels.testing.audit import Key, Row, audit, budget, figures, load_budgets, unchecked, violations
from smt_kernels.testing.cases import OPERATIONS

BUDGETS = Path(__file__).with_name("kernel_budgets.yaml")
COLUMNS = ("call", "size", "dtype", "target", "registers", "spills", "shared KiB", "occupancy", "matrix instructions")
COLUMNS += ("bytes", "FLOPs", "launches", "predicted", "full attention predicted")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    every_size = sorted({size for operation in OPERATIONS.values() for size in operation.sizes})
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print rows, environment and settings as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument(
        "--operations", type=_some_of(OPERATIONS), default=list(OPERATIONS), help="comma-separated; default all"
    )
    parser.add_argument("--targets", type=_some_of(TARGETS), default=list(TARGETS), help=f"of {','.join(TARGETS)}")
    # fp16 has the launch settings of bf16 and moves the same bytes.
    parser.add_argument("--dtypes", type=_some_of(("bf16", "fp32", "fp16")), default=["bf16", "fp32"], help="default bf16,fp32")
    parser.add_argument("--sizes", type=_some_of(every_size), default=every_size, help="head sizes and widths; default all")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile at a time; default one per core")
    parser.add_argument("--quick", action="store_true", help="attention at head size 64 in bf16 for sm_90")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    if options.quick:
        options.targets, options.dtypes, options.sizes = ["sm_90"], ["bf16"], [64]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Audit, print; 1 if a budget is broken with a compiler that the budgets were checked with."""
    options = parse(arguments)
    torch.set_num_threads(1)
    budgets, compiler = load_budgets(BUDGETS), compiler_version()
    known = compiler in budgets["compilers"]
    keys = [
        Key(name, direction, size, dtype, target)
        for name in options.operations
        for direction in OPERATIONS[name].directions
        for size in OPERATIONS[name].sizes
        if size in options.sizes
        for dtype in options.dtypes
        for target in options.targets
    ]
    rows, broken, start = [], [], time.monotonic()
    print(f"compiling {len(keys)} calls, {options.processes} processes at a time", file=sys.stderr, flush=True)
    for row in audit(keys, options.processes):
        rows.append(row)
        broken += violations(row, budgets, compiler)
        print(f"{time.monotonic() - start:4.0f} s  {len(rows)}/{len(keys)}  {row.key}", file=sys.stderr, flush=True)
    if options.json:
        settings = {"length": LENGTH, "batch": BATCH, "heads": HEADS, "launch_seconds": LAUNCH_SECONDS}
        settings["gpus"] = {target: asdict(gpu) for target, gpu in GPUS.items()}
        document = {"environment": environment(torch.device("cpu")), "predictions": settings, "broken_budgets": broken}
        document["compiler_checked"] = known
        print(json.dumps(document | {"rows": [as_dict(row) for row in rows]}, indent=1))
    else:
        table = [_cells(row, budgets, compiler) for row in rows]
        print((markdown if options.markdown else aligned)([COLUMNS, *table]))
        print(f"\n{_legend()}")
    for line in broken:
        print(f"{'over budget' if known else unchecked(budgets, compiler)}: {line}", file=sys.stderr)
    return 1 if broken and known else 0


def as_dict(row: Row) -> dict[str, Any]:
    """A row as JSON takes it; times in seconds, both predicted."""
    return {
        **asdict(row.key),
        "kernels": [asdict(kernel) for kernel in row.kernels],
        **figures(row.count),
        "bytes_requested": row.count.traffic.bytes,
        "least_bytes": row.count.least_bytes,
        "dot_flops": row.count.traffic.dot_flops,
        "useful_flops": row.count.useful_flops,
        "predicted_seconds": predicted_seconds(row),
        "full_attention_predicted_seconds": full_attention_seconds(row),
    }


def _cells(row: Row, budgets: dict[str, Any], compiler: str) -> tuple[str, ...]:
    def of_kernels(values: list) -> str:
        return " / ".join(str(value) for value in values)

    key, kernels, ratios = row.key, row.kernels, figures(row.count)
    held = key.size in budgets["sizes"][key.operation] and key.dtype in budgets["dtypes"]

    def ratio(figure: str) -> str:
        value, (asked, _) = ratios[figure], budget(key, figure, budgets, compiler)
        if value is None:
            return "-"
        over = f" (budget {asked:g})" if held and asked is not None and value > asked else ""
        return (f"{value}" if figure == "launches" else f"{value:.2f}") + over

    return (
        key.call,
        str(key.size),
        key.dtype,
        key.target,
        of_kernels([kernel.registers for kernel in kernels]),
        of_kernels([kernel.spills for kernel in kernels]),
        of_kernels([f"{kernel.shared_bytes / 1024:.0f}" for kernel in kernels]),
        of_kernels([f"{kernel.occupancy:.0%}" for kernel in kernels]),
        of_kernels([_instructions(kernel.matrix_instructions) for kernel in kernels]),
        ratio("bytes"),
        ratio("flops"),
        ratio("launches"),
        _milliseconds(predicted_seconds(row)),
        _milliseconds(full_attention_seconds(row)),
    )


def _instructions(counts: dict[str, int]) -> str:
    return "+".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms"


def _legend() -> str:
    gpus = "; ".join(
        f"{target}: {gpu.name}, {gpu.bandwidth / 1e12:.3g} TB/s, {gpu.flops['bf16'] / 1e12:.0f} TFLOP/s in bf16"
        for target, gpu in GPUS.items()
    )
    lines = (
        "Size: of a head in attention, the vocabulary of the loss, the width in the rest. Where several figures stand, one per",
        "launch. Bytes requested over the least and FLOPs of dots over the useful ones are of Triton kernels, not of the",
        "matrix library between them.",
        f"Times are predicted, not measured: {BATCH} sequences of {LENGTH:,} ({BATCH} rows in decoding, full attention with",
        f"{LENGTH:,} keys), {HEADS} heads in attention, {LAUNCH_SECONDS * 1e6:g} us per launch; {gpus}.",
    )
    return "\n".join(lines)


def _some_of(choices: Any) -> Any:
    """A parser of comma-separated members of ``choices``."""

    def parse_names(text: str) -> list:
        kind = type(next(iter(choices)))
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = [None]
        if not set(values) <= set(choices):
            raise argparse.ArgumentTypeError(f"must be some of {', '.join(map(str, choices))}, got {text!r}")
        return values

    return parse_names


if __name__ == "__main__":
    sys.exit(main())
