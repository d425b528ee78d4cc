"""``smt info``: what is installed here, and which backend runs each kernel operation and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

from smt.cli.parser import add_device
from smt.runtime.tables import aligned

EXAMPLES = """\
  smt info                                             a table
  smt info --json                                      the same to attach to a report of a problem
  smt info --device cpu                                the backends for CPU tensors where there is a GPU, too"""
PACKAGES = (
    *("stride-memory-transformer", "torch", "triton", "safetensors", "numpy", "tokenizers", "transformers", "datasets"),
    *("accelerate", "matplotlib", "mamba-ssm", "causal-conv1d"),
)
# A usual head, which is all that the choice of a backend depends on besides the device.
HEAD_DIM = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``smt info``."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    add_device(parser)


def run(options: argparse.Namespace, started: float) -> int:
    """Print what there is."""
    facts = describe(options.device)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    devices = facts["devices"]
    machine = {
        "Python": facts["python"],
        "platform": facts["platform"],
        "devices": ", ".join([f"cpu with {facts['cores']} cores, {facts['threads']} threads of torch", *devices["cuda"]]),
        "CUDA of torch": devices["cuda_version"] or "built without",
    }
    _print_columns(machine.items())
    print("\npackages")
    _print_columns((f"  {name}", version or "not installed") for name, version in facts["packages"].items())
    print(f"\nkernel operations on {facts['device']}, {facts['dtype']}, heads of {HEAD_DIM}")
    _print_columns((f"  {name}", choice["backend"], choice["reason"]) for name, choice in facts["operations"].items())
    return 0


def describe(device: str = "auto") -> dict[str, Any]:
    """Versions, devices, threads, and the backend of each kernel operation with the reason, as JSON can hold them.

    Args:
        device: for whose tensors the backends are chosen.

    Raises:
        ValueError: no such device.
    """
    import torch

    from smt.runtime.device import find_device
    from smt.runtime.environment import version_of
    from smt_kernels.backends import TRITON_LIMITS, automatic_choice

    chosen = find_device(device)
    example = torch.empty(1, 1, 1, HEAD_DIM, device=chosen)
    choices = {operation: automatic_choice(operation, example) for operation in TRITON_LIMITS}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": {
            "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "cuda_version": torch.version.cuda,
        },
        "packages": {name: version_of(name) for name in PACKAGES},
        "device": chosen.type,
        "dtype": str(example.dtype).removeprefix("torch."),
        "operations": {name: {"backend": choice.backend, "reason": choice.reason} for name, choice in sorted(choices.items())},
    }


def _print_columns(rows: Any) -> None:
    print(aligned([tuple(map(str, row)) for row in rows]))
