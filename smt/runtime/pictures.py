"""A picture that is written to a file: matplotlib's, without a window and without its state for the whole process."""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING

from smt.runtime.extras import needs_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# So many points are shown as such.
FEW = 20


def empty_picture(size: tuple[float, float]) -> Figure:
    """A figure of ``size`` inches with nothing on it yet.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with needs_extra("train"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def marker_of(points: Sized) -> str | None:
    """A dot for lines of few points: a line of one would not be seen."""
    return "." if len(points) <= FEW else None
