"""Settings that PyTorch reads once, when it is first imported or first allocates; torch is not imported here."""

from __future__ import annotations

import os

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


# Turns of a waiting thread's loop, some tens of microseconds: most waits between the small operations of a step are shorter.
SPINS = 4000


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
