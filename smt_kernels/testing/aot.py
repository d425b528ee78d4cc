"""Compile Triton kernels ahead of time, without a GPU, and read what the compiler made of them.

    reports = compile_ahead([Call("smt_kernels.window_attention.kernels:forward", dict(q=q, k=k, v=v, ...))])

Each call runs the real launcher on meta tensors in a process of its own, in which a stand-in driver names the target and a
launch compiles and stops. So what is measured is what would run: the same specialisation and the same settings from the
table of ``smt_kernels.launch``. The process is needed because kernels imported under ``TRITON_INTERPRET=1`` cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smt_kernels.window import WindowSpec

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# Target -> family in the launch table, shared memory of one program in bytes. For sm_80 and sm_100 that of the small chips
# which share their launch settings or their family's: 99 KiB of sm_86, sm_89 and sm_120 for the first.
FAMILY = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna"}
_SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# Shared memory of one multiprocessor, of which each program reserves 1 KiB; 64 K registers and 64 warps on all three.
_SHARED_OF_SM = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
# Instructions that run on the matrix units.
_MATRIX = {"sm_80": ("HMMA",), "sm_90": ("HGMMA", "HMMA"), "sm_100": ("UTCHMMA", "HMMA"), "gfx942": ("v_mfma",)}


@dataclass(frozen=True)
class Call:
    """A launcher, ``"module:function"``, and its keyword arguments: tensors, of which only the form matters, and plain values.

    Plain values are numbers, strings, None, ``WindowSpec``, and tuples of all these.
    """

    function: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class KernelReport:
    """One compiled kernel: its name, target and warps, and per thread or per program what it takes.

    ``registers`` and ``spills`` (loads and stores of registers that did not fit) are per thread, ``shared_bytes`` per program
    with its ``shared_limit``; ``occupancy`` is the share of the resident warps that registers and shared memory leave room
    for; ``matrix_instructions`` counts by name the instructions on tensor or matrix cores, ``instructions`` all. ``call`` is
    the index of the call that launched it.
    """

    function: str
    kernel: str
    target: str
    num_warps: int
    registers: int
    spills: int
    shared_bytes: int
    shared_limit: int
    occupancy: float
    matrix_instructions: dict[str, int]
    instructions: int
    call: int = 0


def compile_ahead(calls: Sequence[Call], targets: Iterable[str] = TARGETS) -> list[KernelReport]:
    """Compile every kernel that ``calls`` launch for every target; one report per launch, in order of target, then call.

    Raises:
        ValueError: an unknown target.
        RuntimeError: a call failed or did not compile; the message ends with the error of the compiling process.
    """
    targets = list(targets)
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    request = json.dumps({"targets": targets, "calls": [asdict(call) for call in calls]}, default=_describe)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "smt_kernels.testing.aot"], input=request, capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"compiling ahead of time failed:\n{done.stderr[-4000:]}")
    return [KernelReport(**report) for report in json.loads(done.stdout.splitlines()[-1])]


def compiler_version() -> str:
    """The version of triton that compiles, without its last part: ``"3.9"``."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "strides": list(value.stride()), "dtype": str(value.dtype).removeprefix("torch.")}
    raise TypeError(
        f"an argument must be a tensor, a number, a string, None, a WindowSpec or a tuple of them, got {type(value).__name__}"
    )


def _restore(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"shape", "strides", "dtype"}:
        return torch.empty_strided(value["shape"], value["strides"], dtype=getattr(torch, value["dtype"]), device="meta")
    if isinstance(value, list):  # JSON has no tuples, and no launcher takes lists
        return tuple(map(_restore, value))
    if isinstance(value, dict) and value.keys() == WindowSpec.__dataclass_fields__.keys():
        return WindowSpec(**value)
    return value


def _serve() -> None:
    """The compiling process: calls from standard input, reports to the last line of standard output."""
    request = json.load(sys.stdin)
    reports = [
        asdict(report) | {"function": call["function"], "call": index}
        for target in request["targets"]
        for index, call in enumerate(request["calls"])
        for report in _compile_call(call, target)
    ]
    print(json.dumps(reports))


def _compile_call(call: dict[str, Any], target: str) -> list[KernelReport]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from smt_kernels import launch

    class StandInDriver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)

        def get_current_device(self) -> str:
            return target

        def get_current_stream(self, device: str) -> int:
            return 0

    compiled: list[Any] = []
    original_run, original_family, original_driver = JITFunction.run, launch.architecture_family, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        compiled.append(original_run(self, *args, grid=grid, warmup=True, **named))

    driver.set_active(StandInDriver())
    launch.architecture_family = lambda device: FAMILY[target]
    JITFunction.run = compile_only
    try:
        module, _, name = call["function"].partition(":")
        getattr(importlib.import_module(module), name)(**{key: _restore(value) for key, value in call["arguments"].items()})
    finally:
        JITFunction.run, launch.architecture_family = original_run, original_family
        driver._active = original_driver
    return [(_report_amd if target.startswith("gfx") else _report_nvidia)(kernel, target) for kernel in compiled]


def _report_nvidia(kernel: Any, target: str) -> KernelReport:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        # nvdisasm alone, without labels of branches, takes half as long as when cuobjdump lists the instructions.
        resources, listing = (
            subprocess.run([str(tools / tool), *options, str(cubin)], capture_output=True, text=True, check=True).stdout
            for tool, *options in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c", "-ndf"))
        )
    registers = int(re.search(r"REG:(\d+)", resources)[1])
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", listing))
    num_warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    registers_of_warp = -(-registers * 32 // 256) * 256  # allocated 256 at a time
    programs = min(32, 64 // num_warps, 65536 // registers_of_warp // num_warps, _SHARED_OF_SM[target] // (shared + 1024))
    return KernelReport(
        function="",
        kernel=kernel.metadata.name,
        target=target,
        num_warps=num_warps,
        registers=registers,
        spills=opcodes["LDL"] + opcodes["STL"],
        shared_bytes=shared,
        shared_limit=_SHARED_LIMIT[target],
        occupancy=programs * num_warps / 64,
        matrix_instructions={name: opcodes[name] for name in _MATRIX[target] if opcodes[name]},
        instructions=opcodes.total(),
    )


def _report_amd(kernel: Any, target: str) -> KernelReport:
    assembly = kernel.asm["amdgcn"]

    def figure(pattern: str) -> int:
        return int(re.search(pattern, assembly)[1])

    opcodes = Counter(re.findall(r"^\s+([a-z]\w+)\s", assembly, flags=re.MULTILINE))
    matrix = sum(count for name, count in opcodes.items() if name.startswith("v_mfma"))
    return KernelReport(
        function="",
        kernel=kernel.metadata.name,
        target=target,
        num_warps=kernel.metadata.num_warps,
        registers=figure(r"\.vgpr_count:\s+(\d+)"),
        spills=figure(r"\.vgpr_spill_count:\s+(\d+)"),
        shared_bytes=kernel.metadata.shared,
        shared_limit=_SHARED_LIMIT[target],
        occupancy=figure(r"; Occupancy: (\d+)") / 8,
        matrix_instructions={"v_mfma": matrix} if matrix else {},
        instructions=sum(count for name, count in opcodes.items() if re.match(r"[vs]_|ds_|global_|buffer_|flat_", name)),
    )


if __name__ == "__main__":
    _serve()
