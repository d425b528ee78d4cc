"""Plots of runs, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt.runtime.names import in_plot
from smt.runtime.pictures import empty_picture, marker_of
from smt.training.progress import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DASHES = ("-", "--", ":", "-.")


def training_curves(history: History, path: str | Path, *, title: str) -> None:
    """Draw training and held-out loss over the steps, with perplexity on the right-hand axis."""
    figure, axes = _figure()
    marker = marker_of(history.train_steps)
    axes.plot(history.train_steps, history.train_loss, color="tab:blue", linewidth=1, marker=marker, label="training")
    axes.plot(history.eval_steps, history.val_loss, color="tab:orange", marker="o", label="held out")
    if history.val_loss:
        axes.annotate(
            f"{history.val_loss[-1]:.3f}",
            (history.eval_steps[-1], history.val_loss[-1]),
            xytext=(-6, 8),
            textcoords="offset points",
            ha="right",
        )
    _losses(axes, title)
    axes.legend()
    _perplexity(axes)
    figure.savefig(path, dpi=120)


def curves_of_runs(histories: Mapping[str, History], path: str | Path) -> None:
    """Draw the held-out losses of several runs, and faintly their training losses, over the steps."""
    figure, axes = _figure()
    _curves(axes, histories)
    _losses(axes, "held-out loss; faint: training loss")
    _legend_below(figure, axes)
    _perplexity(axes)
    figure.savefig(path, dpi=120)


def comparison(figures: Mapping[str, float], histories: Mapping[str, History], path: str | Path, *, label: str) -> None:
    """Draw one figure of every run as a bar, best first, beside the runs' curves, each in the colour of its bar.

    Args:
        figures: of each run by name, best first.
        histories: of the same runs.
        label: what the figures are.
    """
    figure, (bars, curves) = _figure(2, (13, max(4.8, 1.6 + 0.32 * len(figures))))
    places = range(len(figures))
    finite = {name: value if math.isfinite(value) else 0.0 for name, value in figures.items()}
    drawn = bars.barh(places, list(finite.values()), color=[_style(place)["color"] for place in places])
    bars.bar_label(drawn, [f"{value:,.4g}" for value in figures.values()], padding=3, fontsize=8)
    bars.set_yticks(places, [in_plot(name) for name in figures], fontsize=8)
    bars.invert_yaxis()
    bars.margins(x=0.12)
    bars.set(xlabel=label, title=f"{label} on held-out documents, best first")
    bars.grid(alpha=0.3, axis="x")
    _curves(curves, {name: histories[name] for name in figures})
    _losses(curves, "held-out loss; faint: training loss")
    figure.savefig(path, dpi=120)


def _curves(axes: Axes, histories: Mapping[str, History]) -> None:
    for place, (name, history) in enumerate(histories.items()):
        style = _style(place)
        marker = marker_of(history.train_steps)
        axes.plot(history.train_steps, history.train_loss, **style, linewidth=0.6, marker=marker, alpha=0.25)
        axes.plot(history.eval_steps, history.val_loss, **style, marker="o", markersize=3, label=in_plot(name))


def _style(place: int) -> dict[str, str]:
    """A colour, and after ten of them other dashes."""
    return {"color": f"C{place % 10}", "linestyle": DASHES[place // 10 % len(DASHES)]}


def _losses(axes: Axes, title: str) -> None:
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)", title=in_plot(title))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)


def _perplexity(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    perplexity = axes.secondary_yaxis("right")
    perplexity.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{math.exp(loss):,.0f}" if loss < 700 else "∞"))
    perplexity.set_ylabel("perplexity")


def _legend_below(figure: Figure, axes: Axes) -> None:
    longest = max(map(len, axes.get_legend_handles_labels()[1]), default=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=max(1, 90 // (8 + longest)), fontsize=8)


def _figure(n_columns: int = 1, size: tuple[float, float] = (8, 4.8)) -> tuple[Figure, Any]:
    figure = empty_picture(size)
    return figure, figure.subplots(1, n_columns)
