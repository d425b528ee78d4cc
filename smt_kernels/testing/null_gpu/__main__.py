"""Run a command on the null GPU: ``python -m smt_kernels.testing.null_gpu [--capability 90] COMMAND ...``."""

from __future__ import annotations

import argparse
import os
import sys

from smt_kernels.testing.null_gpu import environment


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m smt_kernels.testing.null_gpu", description=__doc__)
    parser.add_argument("--capability", type=int, default=90, help="compute capability, times 10 (default: 90)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, with its arguments")
    options = parser.parse_args()
    if not options.command:
        parser.error("no command is given")
    try:
        os.execvpe(options.command[0], options.command, environment(options.capability))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
