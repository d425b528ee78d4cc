"""A picture that is written to a file: matplotlib's, without a window and without its state for the whole process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt.runtime.extras import needs_extra, optional
from smt.runtime.files import write_files

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


def draw_all(folder: Path, plots: Mapping[str, Callable[[Path], Any]]) -> list[Path]:
    """Draw each of ``plots``, which are by the names of their files, in ``folder``; a warning stands for one that cannot be.

    Returns:
        the paths of what was drawn.
    """
    files = []
    for name, draw in plots.items():
        with optional(name):
            write_files({folder / name: draw})
            files.append(folder / name)
    return files


def marker_of(points: Sized) -> str | None:
    """A dot for lines of few points: a line of one would not be seen."""
    return "." if len(points) <= FEW else None
