"""What the memory's writes launch on a GPU, forward and backward: each kernel, how often, and how long one of it takes.

    python benchmarks/profile_memory.py --rows 8 --length 4096 --set write_group=32

GPT-2 small's width and 24 Mamba layers in bf16, launched one by one. A kernel of a few microseconds takes longer here than in
a CUDA graph beside others of its kind; how long all take together is in ``bench_card.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from card_cases import Suite, gpt2_small
from card_clock import WARM_UPS, launched

from smt import SMTConfig
from smt.runtime.fields import parse
from smt.runtime.process import keep_freed_memory

WIDTH = 60  # letters of a kernel's name


def table(call: Callable[[], object], device: torch.device) -> str:
    """The kernels of a call after some that compile, those that take longest together first."""
    for _ in range(WARM_UPS):
        call()
    times: dict[str, list[float]] = {}
    for name, start, stop in launched(call, device):
        times.setdefault(name, []).append(stop - start)
    lines = ["| kernel | launches | median | together |", "|---|---|---|---|"]
    for name, of in sorted(times.items(), key=lambda pair: -sum(pair[1])):
        lines.append(f"| `{name[:WIDTH]}` | {len(of):,} | {1e6 * statistics.median(of):.1f} us | {1e3 * sum(of):.2f} ms |")
    every = [time for of in times.values() for time in of]
    return "\n".join([*lines, f"| all | {len(every):,} | | {1e3 * sum(every):.2f} ms |"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8, help="sequences (default: 8)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of each (default: 4096)")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of SMTConfig")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("profile_memory.py profiles CUDA devices, and there is none here", file=sys.stderr)
        return 1
    keep_freed_memory()
    device = torch.device("cuda", torch.cuda.current_device())
    changes = {name: parse(SMTConfig, name, value) for name, _, value in (given.partition("=") for given in options.set)}
    print(torch.cuda.get_device_name(device))
    print(table(Suite(gpt2_small(), device).writes(options.rows, options.length, **changes), device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
