"""A GPU that computes nothing, to run on a CPU what the host does on one.

    python -m smt_kernels.testing.null_gpu smt train --steps 10

PyTorch and Triton find a CUDA device there. Kernels are compiled for it and launched with the real arguments, CUDA graphs are
recorded and replayed, memory is allocated and copied; only no kernel computes, so that results are what their memory held. It
refuses what a GPU refuses of the host: tensors of the CPU given to kernels, launches beyond its limits, and whatever waits for
the device while a graph is recorded. And it counts (``counts``), which no clock of a busy machine can disturb.

``runtime.c`` stands for the CUDA runtime, the driver, cuBLAS and NVRTC; cuDNN is not there, so that PyTorch must be told to do
without it (``torch.backends.cuda.enable_cudnn_sdp(False)``). PyTorch for CUDA 13, Linux and a C compiler are needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

# The libraries of the CUDA package that it stands for, beside the driver.
_LIBRARIES = ("cudart", "cublas", "cublasLt", "nvrtc")
# Capability, times 10: KiB of shared memory that a program may have, and threads of a multiprocessor.
_DEVICES = {75: (64, 1024), 80: (163, 2048), 86: (99, 1536), 89: (99, 1536), 90: (227, 2048), 100: (227, 2048), 120: (99, 1536)}
# Under these names it is found by who opens a library by name: Triton and PyTorch.
_SONAMES = ("libcuda.so.1", "libnvrtc.so.13")


@dataclass(frozen=True)
class Counts:
    """What a process has asked of the device since it began.

    Attributes:
        kernels: launches, also those put into a graph: of PyTorch's kernels, of Triton's, and products.
        triton: those of Triton's kernels alone.
        products: those of cuBLAS alone.
        graphs: CUDA graphs that were replayed.
        captured: nodes that were put into graphs.
        to_device, to_host: copies between the device and the host.
        waits: times that the host waited for the device.
    """

    kernels: int
    triton: int
    products: int
    graphs: int
    captured: int
    to_device: int
    to_host: int
    waits: int

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))


def counts() -> Counts:
    """Those of this process.

    Raises:
        RuntimeError: it does not run on the null GPU.
    """
    try:
        tell = ctypes.CDLL(None).null_gpu_counts
    except AttributeError:
        raise RuntimeError("this process does not run on the null GPU: see python -m smt_kernels.testing.null_gpu") from None
    found = (ctypes.c_long * len(fields(Counts)))()
    tell(found)
    return Counts(*found)


def missing() -> str | None:
    """What the null GPU needs and this machine lacks; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    header = _headers() / "cuda_runtime_api.h"
    if not header.is_file() or not re.search(r"define CUDART_VERSION +13", header.read_text(errors="replace")):
        return "this triton brings no headers of CUDA 13"
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.cu13") is None:
        return "PyTorch is not one for CUDA 13"
    absent = [tool for tool in (_compiler(), "nm") if shutil.which(tool) is None]
    return f"there is no {absent[0]}" if absent else None


def environment(capability: int = 90) -> dict[str, str]:
    """The environment of this process, and what makes of a process that begins with it one on the null GPU.

    Args:
        capability: the compute capability that the device says it has, times 10.

    Raises:
        ValueError: no such device is known.
        RuntimeError: something is ``missing``.
    """
    if capability not in _DEVICES:
        raise ValueError(f"capability must be one of {', '.join(map(str, _DEVICES))}, got {capability}")
    if (why := missing()) is not None:
        raise RuntimeError(f"no null GPU can be built: {why}")
    folder = _build()
    libraries = " ".join([*(str(folder / name) for name in _SONAMES), *os.environ.get("LD_PRELOAD", "").split()])
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shared, threads = _DEVICES[capability]
    device = f"{capability},{shared << 10},{threads}"
    return kept | {"LD_PRELOAD": libraries, "TRITON_LIBCUDA_PATH": str(folder), "NULL_GPU": device}


def _build() -> Path:
    """The folder of the libraries in the user's cache, built where nobody has yet for these versions."""
    source = Path(__file__).with_name("runtime.c")
    of = hashlib.sha256(source.read_bytes() + Path(__file__).read_bytes() + version("torch").encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smt_kernels" / f"null_gpu_{of}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        exports = Path(work) / "exports.c"
        idle = sorted(_exported() - _written(source))
        exports.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in idle))
        for name in _SONAMES:
            _run(
                _compiler(), "-w", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{name}", f"-I{_headers()}",
                "-o", str(Path(work) / name), str(source), str(exports), "-ldl", "-lpthread",
            )  # fmt: skip
        with suppress(OSError):  # another process was first
            os.rename(work, folder)
    return folder


def _exported() -> set[str]:
    """The functions that PyTorch and Triton may call."""
    (to_driver,) = (_package("torch") / "lib").glob("libcaffe2_nvrtc.so")
    names = re.findall(r" U (cu[A-Z]\w+)", _run("nm", "-D", "--undefined-only", str(to_driver)))
    names += re.findall(r"CUDAAPI (cu[A-Z]\w+)\(", (_headers() / "cuda.h").read_text(errors="replace"))
    for library in _LIBRARIES:
        (path,) = (_package("nvidia.cu13") / "lib").glob(f"lib{library}.so.*")
        names += re.findall(r" ((?:__)?(?:cuda|cublas|nvrtc)\w+)", _run("nm", "-D", "--defined-only", str(path)))
    return set(names)


def _written(source: Path) -> set[str]:
    """The functions that ``source`` defines."""
    return set(re.findall(r"(?:^|[ *(])((?:__)?(?:cu|nvrtc)\w+)(?=[()])", source.read_text(), re.MULTILINE))


def _headers() -> Path:
    return _package("triton") / "backends" / "nvidia" / "include"


def _package(name: str) -> Path:
    return Path(next(iter(importlib.util.find_spec(name).submodule_search_locations)))


def _compiler() -> str:
    return os.environ.get("CC", "cc")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed while the null GPU was built: {done.stderr[-2000:]}")
    return done.stdout
