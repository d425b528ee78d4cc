"""Plots of evaluations, as PNG files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt.evaluation.ablation import Ablation
from smt.evaluation.needle import NeedleGrid
from smt.evaluation.pooling import PoolingAnalysis
from smt.evaluation.position import LossByPosition
from smt.evaluation.recall import Recall
from smt.runtime.names import in_plot
from smt.runtime.pictures import empty_picture, marker_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The marker shifts by one where the colours begin again.
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
MARKERS = "osD^vP"
# A bin of a difference between models with fewer tokens shows chance alone.
LEAST_TOKENS = 256


def plot_positions(results: Mapping[str, LossByPosition], marks: Mapping[str, int], path: str | Path) -> None:
    """Loss over position for each model, with its 95 % interval; ``marks`` are vertical lines at positions, by name."""
    figure, axes = _figure()
    _draw_positions(axes, results, marks)
    axes.set_ylabel("loss (nats per token)", fontsize=12)
    axes.set_title("loss by position in the document (with 95 % intervals over documents)", fontsize=13)
    _legend_below(axes)
    _save(figure, path)


def plot_position_differences(results: Mapping[str, LossByPosition], control: str, path: str | Path) -> None:
    """How much more each model loses than the control, over position.

    Bins of fewer than ``LEAST_TOKENS`` tokens are left out where a longer one exists.
    """
    figure, axes = _figure()
    most = max(mean.n_tokens for result in results.values() for mean in result.bins if mean is not None)
    least = min(LEAST_TOKENS, most)
    shown = {
        name: replace(result, bins=tuple(mean if mean and mean.n_tokens >= least else None for mean in result.bins))
        for name, result in results.items()
    }
    _draw_positions(axes, shown, {})
    axes.axhline(0.0, color="0.3", linewidth=1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.4g}" if value else "0")
    axes.set_ylabel("loss minus that of the control\n(nats per token; below 0 is better)", fontsize=12)
    axes.set_title(
        f"what each model gains or loses against {in_plot(control)}\n(with 95 % intervals over documents)", fontsize=13
    )
    _legend_below(axes)
    _save(figure, path)


def _draw_positions(axes: Axes, results: Mapping[str, LossByPosition], marks: Mapping[str, int]) -> None:
    for index, (name, result) in enumerate(results.items()):
        # The middle of a bin on the logarithmic axis.
        bins = [
            ((start * (stop - 1)) ** 0.5, mean)
            for start, stop, mean in zip(result.edges, result.edges[1:], result.bins, strict=False)
            if mean is not None
        ]
        x, y = [middle for middle, _ in bins], [mean.nats for _, mean in bins]
        colour = COLOURS[index % len(COLOURS)]
        marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        axes.plot(x, y, color=colour, marker=marker, markersize=4, label=in_plot(name))
        known = [(middle, mean) for middle, mean in bins if mean.margin is not None]
        low, high = ([mean.nats + sign * mean.margin for _, mean in known] for sign in (-1, 1))
        axes.fill_between([middle for middle, _ in known], low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)  # as bins grow; a tick, with its number, at powers of two alone
    axes.xaxis.get_major_locator().set_params(numticks=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    axes.minorticks_off()
    axes.set_xlabel("tokens of the document before", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    for name, position in marks.items():
        axes.axvline(position, color="0.3", linestyle="--", linewidth=1)
        axes.annotate(
            f"{name}: {position:,}",
            (position, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -6),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=10,
            color="0.3",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )


def plot_needles(results: Mapping[str, NeedleGrid], path: str | Path) -> None:
    """A heat map of accuracy over depth and length for each model, side by side, with its numbers."""
    width = sum(1.2 + 0.75 * len(grid.lengths) for grid in results.values())
    figure = empty_picture((max(5.0, width + 1.0), 4.2))
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, grid) in zip(panels, results.items(), strict=True):
        image = axes.imshow(grid.accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths])
        axes.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths])
        axes.set_xlabel("length of the haystack (tokens)")
        axes.set_title(f"{in_plot(name)}\nmean {_mean(grid):.0%}, chance {grid.chance:.0%}", fontsize=10)
        for row, values in enumerate(grid.accuracy):
            for column, value in enumerate(values):
                colour = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    panels[0].set_ylabel("depth of the needle (0 %: at the beginning)")
    bar = figure.colorbar(image, ax=list(panels))
    bar.set_label("share of needles found")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _save(figure, path)


def plot_recall(results: Mapping[str, Recall], marks: Mapping[str, int], path: str | Path) -> None:
    """Accuracy over distance for each model, with chance and ``marks``."""
    figure, axes = _figure()
    for index, (name, result) in enumerate(results.items()):
        x = [there.distance for there in result.distances]
        y = [100 * there.accuracy for there in result.distances]
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "label": in_plot(name)}
        axes.plot(x, y, **style, markersize=5)
    chance = next(iter(results.values())).chance
    axes.axhline(100 * chance, color="0.5", linestyle=":", label=f"chance, {chance:.1%}")
    for (name, distance), dashes in zip(marks.items(), itertools.cycle(["--", "-."])):
        axes.axvline(distance, color="0.3", linestyle=dashes, linewidth=1, label=f"{name}: {distance}")
    axes.set_xscale("log", base=2)
    ticks = sorted({there.distance for result in results.values() for there in result.distances})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel="words since the pair was shown", ylabel="values recalled (%)", ylim=(-3, 103))
    axes.set_title("associative recall by distance", fontsize=11)
    axes.grid(alpha=0.3)
    _legend_below(axes)
    _save(figure, path)


def plot_ablations(results: Mapping[str, Ablation], spans: Mapping[str, str], path: str | Path) -> None:
    """What each hindrance costs in loss, by where the token stands; ``spans`` name the positions of window, slots, beyond."""
    figure, axes = _figure(size=(9, 4.8))
    whole, hindered = results["whole"], {name: result for name, result in results.items() if name != "whole"}
    there = [span for span in spans if getattr(whole, span) is not None]
    width = 0.8 / len(hindered)
    for index, (name, result) in enumerate(hindered.items()):
        x = [place + (index - (len(hindered) - 1) / 2) * width for place in range(len(there))]
        rises = [getattr(result, span).nats - getattr(whole, span).nats for span in there]
        y = [rise if abs(rise) >= 0.0005 else 0.0 for rise in rises]  # what is shown as zero has no side
        bars = axes.bar(x, y, width, color=COLOURS[index % len(COLOURS)], label=in_plot(name))
        axes.bar_label(bars, [f"{value:+.3f}" if value else "0" for value in y], padding=2, fontsize=8)
    axes.use_sticky_edges = False  # numbers of bars below zero have room, too
    axes.margins(y=0.15)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_xticks(
        range(len(there)),
        [f"{spans[span]}\nwhole model: {getattr(whole, span).nats:.3f}" for span in there],
        fontsize=9,
    )
    axes.set(xlabel="position in the document", ylabel="additional loss (nats per token)")
    axes.set_title("what the loss rises by when the memory is hindered", fontsize=11)
    _legend_below(axes)
    _save(figure, path)


def plot_pooling(result: PoolingAnalysis, path: str | Path) -> None:
    """Mean pooling weight by entry of the window with the boundary between slots and tokens, and shares by write."""
    figure, (bars, lines) = _figure(2, (8, 6.4))
    size, n_memory = len(result.weights), result.n_memory
    colours = ["tab:orange"] * n_memory + ["tab:blue"] * (size - n_memory)
    bars.bar(range(size), [100 * weight for weight in result.weights], color=colours, width=0.85)
    bars.axhline(100 / size, color="0.4", linestyle=":", linewidth=1, label=f"uniform, {100 / size:.2f} %")
    if n_memory:
        bars.axvline(n_memory - 0.5, color="0.2", linestyle="--", linewidth=1, label="boundary: slots left, tokens right")
    mean = result.mean
    bars.set(xlabel="entry of the window (oldest slot to newest token)", ylabel="mean weight (%)", xlim=(-1, size))
    bars.margins(y=0.12)
    bars.xaxis.get_major_locator().set_params(integer=True)
    bars.set_title(
        f"attention pooling over {result.n_writes:,} writes: slots {mean.ssm_total:.0%}, tokens {mean.input_total:.0%}, "
        f"entropy {mean.entropy:.2f} nats",
        fontsize=11,
    )
    _legend_below(bars)
    x = range(result.first_write, result.first_write + len(result.by_write))
    by_write, marker = result.by_write, marker_of(x)
    for label, colour, dashes, weights in (
        ("slots, all", "tab:orange", "-", [write.ssm_total for write in by_write]),
        ("largest slot", "tab:orange", ":", [write.ssm_max for write in by_write]),
        ("largest token", "tab:blue", ":", [write.input_max for write in by_write]),
    ):
        percent = [100 * weight for weight in weights]
        lines.plot(x, percent, color=colour, linestyle=dashes, linewidth=1, marker=marker, label=label)
    lines.set(xlabel="number of the write", ylabel="weight (%)")
    lines.set_ylim(bottom=0)
    lines.grid(alpha=0.3)
    entropy = lines.twinx()
    name = "entropy (right-hand axis)"
    entropy.plot(x, [write.entropy for write in by_write], color="tab:green", linewidth=1, marker=marker, label=name)
    entropy.set_ylabel("entropy (nats)")
    entropy.set_ylim(0, 1.15 * math.log(size))
    handles = [line for axes in (lines, entropy) for line in axes.get_lines()]
    _legend_below(lines, handles)
    _save(figure, path)


def _figure(n_rows: int = 1, size: tuple[float, float] = (8, 4.8)) -> tuple[Figure, Any]:
    figure = empty_picture(size)
    return figure, figure.subplots(n_rows, 1)


def _legend_below(axes: Axes, handles: list[Any] | None = None) -> None:
    """A legend outside the axes, where it covers no curve."""
    handles = handles or axes.get_legend_handles_labels()[0]
    labels = [handle.get_label() for handle in handles]
    columns = max(1, min(len(labels), 4, 68 // (8 + max(map(len, labels)))))
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, fontsize=11, frameon=False)


def _save(figure: Figure, path: str | Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")  # a long legend would be cut


def _mean(grid: NeedleGrid) -> float:
    values = [value for row in grid.accuracy for value in row]
    return sum(values) / len(values)
