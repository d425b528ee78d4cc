"""Times on a CUDA device: of kernels alone, replayed in a CUDA graph; of a call, with what the host does for it; and ceilings.

On a CPU, where there are neither graphs nor events, a call is timed by the wall clock: for tests of what is built on this.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

REPEATS = 7
WARM_UPS = 3


@dataclass(frozen=True)
class Times:
    """In seconds.

    Attributes:
        call: from one call to the next, of calls in a row.
        host: median until a call returns to Python, the device idle before it; near ``call`` where the host holds it up.
        peak_bytes: the most memory that tensors took during a call, the first ones included; None on a CPU.
        kernels: in which any kernel or copy of one call ran; None on a CPU, or where nobody asked.
        remark: why something of it is not known.
    """

    call: float
    host: float
    peak_bytes: int | None
    kernels: float | None = None
    remark: str = ""


def time_call(call: Callable[[], object], device: torch.device, repeats: int | None = None, *, kernels: bool = False) -> Times:
    """Time ``call``, which has been made ready, after a few calls that compile and fill caches.

    Args:
        kernels: also in which time kernels ran, whatever the host did; where that cannot be told, the rest still can.
    """
    repeats = REPEATS if repeats is None else repeats
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what CUDA graphs take later, in memory of their own, is not counted
    for _ in range(WARM_UPS):
        call()
    of_host = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        call()
        of_host.append(time.perf_counter() - started)
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):  # as in training: the host goes on to the next call while the device works on this one
        call()
    _wait(device)
    of_call = (time.perf_counter() - started) / repeats
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    of_kernels, remark = None, ""
    if kernels:
        try:
            of_kernels = kernel_seconds(call, device)
        except Exception as error:  # such as a driver that does not let everyone profile
            remark = f"kernels not told apart: {type(error).__name__}: {error}"
    return Times(of_call, statistics.median(of_host), peak, of_kernels, remark)


def kernel_seconds(call: Callable[[], object], device: torch.device) -> float | None:
    """In how many seconds of one call at least one kernel or copy ran, as PyTorch's profiler tells; None on a CPU."""
    return covered((start, stop) for _, start, stop in launched(call, device)) if device.type == "cuda" else None


def launched(call: Callable[[], object], device: torch.device) -> list[tuple[str, float, float]]:
    """Every kernel and copy of one call, as PyTorch's profiler tells: its name, and its first and last second.

    Raises:
        RuntimeError: the profiler has seen none.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    # On a CPU, operators: for tests of what is built on this.
    kind, activity = {"cuda": (DeviceType.CUDA, ProfilerActivity.CUDA)}.get(device.type, (DeviceType.CPU, ProfilerActivity.CPU))
    with profile(activities=[activity]) as profiled:
        call()
        _wait(device)
    events = [event for event in profiled.events() if event.device_type == kind and not event.is_user_annotation]
    if not events:
        raise RuntimeError("the profiler has seen no kernel")
    return [(event.name, 1e-6 * event.time_range.start, 1e-6 * event.time_range.end) for event in events]


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the intervals lasts."""
    total, reached = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def time_kernels(call: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """Seconds of the kernels of one call, gaps between them included, as a CUDA graph runs them: no host takes part."""
    if device.type != "cuda":
        return time_call(call, device).call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what is captured must have been called on the stream of the capture
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    seconds = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        _wait(device)
        seconds.append(start.elapsed_time(stop) / 1e3 / calls)
    return statistics.median(seconds)


def ceilings(device: torch.device, size: int = 8192, n_bytes: int = 2**30) -> dict[str, float]:
    """What the device does at its best: ``copy`` in bytes read and written per second, ``product`` in bf16 FLOPs per second."""
    source = torch.empty(n_bytes // 4, device=device)  # of single bytes a copy is slower
    target = torch.empty_like(source)
    x, y = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)
    return {
        "copy": 2 * n_bytes / time_kernels(lambda: target.copy_(source), device),
        "product": 2 * size**3 / time_kernels(lambda: torch.mm(x, y, out=out), device),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
