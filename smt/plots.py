"""Plots of runs, as PNG files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from smt.extras import needs_extra

if TYPE_CHECKING:
    from smt.training.progress import History


def training_curves(history: History, path: str | Path, *, title: str) -> None:
    """Draw training and held-out loss over the steps, with perplexity on the right-hand axis."""
    with needs_extra("train"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(history.train_steps, history.train_loss, color="tab:blue", linewidth=1, label="training")
    axes.plot(history.eval_steps, history.val_loss, color="tab:orange", marker="o", label="held out")
    if history.val_loss:
        axes.annotate(
            f"{history.val_loss[-1]:.3f}",
            (history.eval_steps[-1], history.val_loss[-1]),
            xytext=(-6, 8),
            textcoords="offset points",
            ha="right",
        )
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    perplexity = axes.secondary_yaxis("right")
    perplexity.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{math.exp(loss):,.0f}"))
    perplexity.set_ylabel("perplexity")
    figure.savefig(path, dpi=120)
