"""What a report of a GPU is made of: one row a figure, and the case that measures it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from card_clock import Times


@dataclass(frozen=True)
class Row:
    """One figure of the report: seconds, beside those of the host and of kernels, and what they mean.

    Attributes:
        section, case, shape: what was measured.
        seconds: of one call; kernels alone where ``host_seconds`` is None.
        host_seconds: until the call returned to Python.
        kernel_seconds: in which any kernel of the call ran; None: not told apart.
        tokens: that one call takes in.
        peak_bytes: the most memory of a call.
        ratio: seconds of the section's first case of this shape over these.
        note: of what is measured; or why there is no figure.
    """

    section: str
    case: str
    shape: str
    seconds: float | None = None
    host_seconds: float | None = None
    kernel_seconds: float | None = None
    tokens: int | None = None
    peak_bytes: int | None = None
    ratio: float | None = None
    note: str = ""


@dataclass
class Case:
    """A name in a section, and what measures it: seconds of kernels, or times of calls."""

    section: str
    name: str
    shape: str
    measure: Callable[[], Times | float]
    tokens: int | None = None
    note: str = ""

    def row(self) -> Row:
        """Measure."""
        measured = self.measure()
        row = Row(self.section, self.name, self.shape, tokens=self.tokens, note=self.note)
        if not isinstance(measured, Times):
            return dataclasses.replace(row, seconds=measured)
        note = "; ".join(filter(None, (self.note, measured.remark)))
        times = {"seconds": measured.call, "host_seconds": measured.host, "kernel_seconds": measured.kernels}
        return dataclasses.replace(row, **times, peak_bytes=measured.peak_bytes, note=note)
