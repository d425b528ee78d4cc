"""Settings that PyTorch reads once, when it is first imported or first allocates; torch is not imported here."""

from __future__ import annotations

import os

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep while they wait for each other.

    They spin otherwise. Beside any other busy process that makes a run on two cores two to six times slower; sleeping costs
    little on an idle machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def use_huge_pages() -> None:
    """Put large tensors in huge pages: first touching them in small ones costs a training step on a CPU 7 %."""
    os.environ.setdefault(HUGE_PAGES, "1")
