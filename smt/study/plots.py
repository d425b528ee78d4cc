"""Pictures of a study, made from its JSON, as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt.runtime.pictures import empty_picture
from smt.study.cell import ORPO, TRAINING
from smt.study.figures import NAMES, STAGE_NAMES, Figure, Study, at, over_seeds
from smt.study.measure import LONG
from smt.study.tables import KIB, LOSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "black", "tab:gray")
SMALL, MEDIUM, LARGE = 11, 12, 14
# Inches, and characters of a line of text.
PAGE, PAGE_COLUMNS = (11.7, 16.5), 116


def plot_results(study: Study, path: str | Path) -> None:
    """Loss, speed and what is kept, a bar for each model."""
    canvas = empty_picture((16, 10))
    axes = canvas.subplots(2, 2).flatten()
    _bars(
        axes[0],
        study,
        LOSS,
        "validation loss after equal tokens\n(nats per token, less is better)",
        "{:.3f}".format,
        floor=True,
    )
    _bars(axes[1], study, at("tokens_per_second"), "training (tokens per second)", "{:,.0f}".format)
    _bars(axes[2], study, at("decoding", "1"), "decoding one sequence (tokens per second)", "{:,.0f}".format)
    kept = [Figure({0: model[f"bytes_at_{LONG}"] / KIB}) for model in study["models"].values()]
    _draw_bars(
        axes[3], study, kept, f"kept for decoding at {LONG:,} tokens\n(KiB per sequence, less is better)", "{:,.0f}".format
    )
    save(canvas, path)


def plot_stages(study: Study, path: str | Path) -> None:
    """The training loss of stage 1, and what stage 2 changes."""
    canvas = empty_picture((17, 6.4))
    curves, losses, margins = canvas.subplots(1, 3, width_ratios=(1.25, 1, 1))
    first = study["settings"]["seeds"][0]
    for colour, model in zip(COLOURS, study["models"], strict=False):
        for run in study["runs"]:
            if (run["model"], run["seed"], run["stage"]) == (model, first, TRAINING):
                curves.plot(run["curve"]["steps"], run["curve"]["losses"], color=colour, linewidth=1.8, label=NAMES[model])
    curves.set_xlabel("optimiser step of stage 1", fontsize=MEDIUM)
    curves.set_ylabel("training loss (nats per token)", fontsize=MEDIUM)
    curves.set_title(f"stage 1, seed {first}", fontsize=LARGE)
    curves.legend(fontsize=SMALL)
    curves.grid(alpha=0.3)
    stages = [(STAGE_NAMES[stage], stage, LOSS) for stage in (TRAINING, ORPO)]
    _pairs(losses, study, stages, "validation loss (nats per token)")
    losses.set_title("held-out documents", fontsize=LARGE)
    found = [(f"{when} stage 2", ORPO, at("preference", when, "margin")) for when in ("before", "after")]
    _pairs(margins, study, found, "log odds, true minus own continuation")
    margins.set_title("held-out pairs", fontsize=LARGE)
    margins.set_yticklabels([])
    losses.legend(fontsize=SMALL, loc="lower left", bbox_to_anchor=(0, -0.24))
    margins.legend(fontsize=SMALL, loc="lower left", bbox_to_anchor=(0, -0.24))
    save(canvas, path)


def plot_report(study: Study, conditions: Sequence[str], winners: Sequence[str], path: str | Path) -> None:
    """One page: what was done, who wins where, a table and bars."""
    canvas = empty_picture(PAGE)
    header, table, lower = canvas.subplots(3, 1, height_ratios=(0.33, 0.19, 0.48))
    header.axis("off")
    header.set_title("Hymba and its relatives, and SMT", fontsize=20, loc="left")
    done, won = (
        "\n".join(textwrap.fill(f"·  {line}", PAGE_COLUMNS, subsequent_indent="   ") for line in lines)
        for lines in (conditions, winners)
    )
    text = header.text(0, 0.99, done, fontsize=MEDIUM, va="top", linespacing=1.3)
    header.annotate("Which model wins where", (0, 0), xycoords=text, xytext=(0, -10), textcoords="offset points", va="top",
                    fontsize=LARGE)  # fmt: skip
    header.annotate(won, (0, 0), xycoords=text, xytext=(0, -34), textcoords="offset points", va="top", fontsize=MEDIUM,
                    linespacing=1.3)  # fmt: skip
    _table(table, study)
    lower.axis("off")
    left, right = (lower.inset_axes(bounds) for bounds in ((0.17, 0.56, 0.34, 0.40), (0.64, 0.56, 0.34, 0.40)))
    below, last = (lower.inset_axes(bounds) for bounds in ((0.17, 0.06, 0.34, 0.40), (0.64, 0.06, 0.34, 0.40)))
    _bars(
        left, study, LOSS, "validation loss after equal tokens\n(nats per token, less is better)", "{:.3f}".format, floor=True
    )
    _bars(right, study, at("tokens_per_second"), "training (tokens per second)", "{:,.0f}".format, names=False)
    _bars(below, study, LOSS, "validation loss after ORPO\n(nats per token, less is better)", "{:.3f}".format, stage=ORPO,
          floor=True)  # fmt: skip
    _bars(last, study, at("decoding", "1"), "decoding one sequence\n(tokens per second)", "{:,.0f}".format, names=False)
    save(canvas, path)


def _table(axes: Axes, study: Study) -> None:
    axes.axis("off")
    columns: list[tuple[str, Callable[[str], str]]] = [
        ("parameters", lambda model: f"{study['models'][model]['parameters']:,}"),
        ("loss, stage 1", lambda model: _text(study, model, TRAINING, LOSS, "{:.3f}".format)),
        ("perplexity", lambda model: _text(study, model, TRAINING, at("held_out", "perplexity"), "{:,.1f}".format)),
        ("bits per byte", lambda model: _text(study, model, TRAINING, at("held_out", "bits_per_byte"), "{:.3f}".format)),
        ("loss, stage 2", lambda model: _text(study, model, ORPO, LOSS, "{:.3f}".format)),
        (f"KiB at {LONG:,}", lambda model: f"{study['models'][model][f'bytes_at_{LONG}'] / KIB:,.0f}"),
    ]
    cells = [[NAMES[model], *(show(model) for _, show in columns)] for model in study["models"]]
    drawn = axes.table(cells, colLabels=["model", *(name for name, _ in columns)], bbox=(0, 0.02, 1, 0.96), cellLoc="right")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(MEDIUM)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_edgecolor("0.8")
        if row == 0:
            cell.set_facecolor("0.93")
        if column == 0:
            cell.get_text().set_horizontalalignment("left")
            cell.set_width(1.4 * cell.get_width())


def _bars(
    axes: Axes,
    study: Study,
    find: Callable[..., Any],
    label: str,
    show: Callable[[float], str],
    *,
    stage: str = TRAINING,
    floor: bool = False,
    names: bool = True,
) -> None:
    figures = [over_seeds(study, model, stage, find) for model in study["models"]]
    _draw_bars(axes, study, figures, label, show, floor=floor, names=names)


def _draw_bars(
    axes: Axes,
    study: Study,
    figures: Sequence[Figure | None],
    label: str,
    show: Callable[[float], str],
    *,
    floor: bool = False,
    names: bool = True,
) -> None:
    """A bar for each model; ``floor``: they begin where they differ, and the axis says so."""
    values = [0.0 if figure is None else figure.mean for figure in figures]
    errors = [(figure.spread if figure is not None else None) or 0.0 for figure in figures]
    places, there = range(len(values)), [value for value in values if value]
    start = 0.0
    if floor and there:
        start = max(0.0, min(there) - 0.6 * (max(there) - min(there) + max(errors)) - 1e-3)
    shown = {"xerr": errors, "error_kw": {"ecolor": "0.25", "capsize": 4}} if any(errors) else {}
    axes.barh(places, [max(0.0, value - start) for value in values], left=start, color=COLOURS[: len(values)], **shown)
    for place, (value, error, figure) in enumerate(zip(values, errors, figures, strict=True)):
        axes.annotate(
            "-" if figure is None else show(value), (value + error, place), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=SMALL,
        )  # fmt: skip
    axes.set_yticks(places, [NAMES[model] for model in study["models"]] if names else [""] * len(values), fontsize=MEDIUM)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    if start:
        axes.set_xlim(left=start)
        label += f"; begins at {start:.2f}"
    axes.set_xlabel(label, fontsize=MEDIUM)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.grid(alpha=0.3, axis="x")


def _pairs(axes: Axes, study: Study, found: Sequence[tuple[str, str, Callable[..., Any]]], label: str) -> None:
    """Two dots for each model with an arrow between them."""
    for place, model in enumerate(study["models"]):
        figures = [over_seeds(study, model, stage, find) for _, stage, find in found]
        for index, ((name, _, _), figure) in enumerate(zip(found, figures, strict=True)):
            if figure is not None:
                style = {"color": COLOURS[place % len(COLOURS)], "marker": "os"[index], "markersize": 9, "capsize": 4}
                face = {"markerfacecolor": "white"} if index == 0 else {}
                label_of = {"label": name} if place == 0 else {}
                axes.errorbar(figure.mean, place, xerr=figure.spread or 0.0, linestyle="none", **style, **face, **label_of)
        if None not in figures:
            ends = {"xy": (figures[1].mean, place), "xytext": (figures[0].mean, place)}
            axes.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": "0.5"})
    axes.set_yticks(range(len(study["models"])), [NAMES[model] for model in study["models"]], fontsize=MEDIUM)
    axes.invert_yaxis()
    axes.set_xlabel(label, fontsize=MEDIUM)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.grid(alpha=0.3)


def _text(study: Study, model: str, stage: str, find: Callable[..., Any], show: Callable[[float], str]) -> str:
    figure = over_seeds(study, model, stage, find)
    return "-" if figure is None else figure.text(show)


def save(canvas: Canvas, path: str | Path) -> None:
    """Write a picture of a study as PNG."""
    canvas.savefig(path, dpi=110)
