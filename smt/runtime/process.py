"""Settings of the process, most of which count only before torch is first imported; it is not imported here. Signals."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# Read when they are imported: by the Hub's library and, through it, by transformers; and by datasets.
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")

# Turns of a waiting thread's loop, some tens of microseconds: most waits between the small operations of a step are shorter.
SPINS = 4000

# Of mallopt(3): no mappings of their own for large blocks (M_MMAP_MAX), nothing given back (M_TRIM_THRESHOLD), and one heap for
# all threads (M_ARENA_MAX), as what the forward pass frees the backward pass takes in a thread of its own.
MALLOC_OPTIONS = ((-4, 0), (-1, -1), (-8, 1))


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep when they have waited for each other a little.

    They spin much longer otherwise: beside any other busy process that makes a run on two cores two to six times slower.
    Sleeping at once costs a third of the speed of training on an idle machine; after a short spin almost nothing on either.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def use_huge_pages() -> None:
    """Put large tensors in huge pages: first touching them in small ones costs a training step on a CPU 7 %."""
    os.environ.setdefault(HUGE_PAGES, "1")


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory for the next tensors; elsewhere do nothing.

    By default it gives every large tensor back to the system, and the next one of that size is made of fresh pages, each to be
    cleared again: a third of the time of attention, forward and backward, over 16,384 tokens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in MALLOC_OPTIONS:
            libc.mallopt(option, value)


def no_bars_unless_watched() -> None:
    """Keep the progress bars of libraries from a file or a pipe; ours are in ``progress_bar``."""
    if not is_watched(sys.stderr):
        for name in BARS:
            os.environ.setdefault(name, "1")


def is_watched(stream: Any) -> bool:
    """Whether an output is a terminal, and not a file, a pipe or none."""
    return stream is not None and not stream.closed and stream.isatty()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or another signal that ends this process, such as a batch system's SIGTERM or a terminal's SIGHUP.

    Attributes:
        signal: which.
        advice: how what was going on can be taken up again; empty: there is nothing to say.
    """

    def __init__(self, number: int = signal.SIGINT, advice: str = "") -> None:
        super().__init__(advice)
        self.signal, self.advice = signal.Signals(number), advice


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Raise ``Interrupted`` for SIGINT, SIGTERM and SIGHUP inside the block, so that it is left in good order.

    A signal that is ignored, as SIGHUP is under nohup, stays so. One of several processes of a run is ended by what launched
    it, and ends at once: it may be waiting for another one, where no exception would reach it.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(number)

    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if several or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled_by(interrupt):
        yield


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals that interrupt wait for the end of the block: an exception inside would lose the process that it begins."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    try:
        with _handled_by(lambda number, frame: held.append(number)):
            yield
    finally:
        for number in held[:1]:
            signal.raise_signal(number)


@contextmanager
def _handled_by(handler: Callable[[int, Any], object]) -> Iterator[None]:
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, its_own in before.items():
            signal.signal(number, its_own)


def restart_with_threads(count: int) -> None:
    """Begin this Python process anew with ``count`` CPU threads, unless it was begun with that many.

    ``torch.set_num_threads`` is not the same: after it, with PyTorch's MKL, every matrix product inside a parallel operation
    waits for a lock, and small attention problems take 1.3 to 1.5 times as long on two threads.
    """
    threads = {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
    if any(os.environ.get(name) != value for name, value in threads.items()):
        os.environ.update(threads)
        os.execv(sys.executable, sys.orig_argv)
