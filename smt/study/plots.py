"""Pictures of a study, made from its JSON, as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt.runtime.pictures import empty_picture
from smt.study.cell import EQUAL_TIME, ORPO, TRAINING
from smt.study.figures import NAMES, STAGE_NAMES, Figure, Study, at, over_seeds
from smt.study.measure import LONG
from smt.study.tables import CARRIED_LOSS, KIB, LOSS, text_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "black", "tab:gray")
SMALL, MEDIUM, LARGE = 11, 12, 14
# Inches, and characters of a line of text.
PAGE, PAGE_COLUMNS = (11.7, 16.5), 116


def plot_results(study: Study, path: str | Path) -> None:
    """Losses after equal tokens and after equal time, as dots; speed and what is kept, a bar for each model."""
    canvas = empty_picture((17, 10.5))
    axes = canvas.subplot_mosaic("AAABBB;CCDDEE")
    _losses(axes["A"], study, TRAINING, "validation loss after equal tokens")
    _losses(axes["B"], study, EQUAL_TIME, "validation loss after equal time", names=False)
    _say_how_it_read(axes["A"], study, ncols=2)
    _bars(axes["C"], study, at("tokens_per_second"), "training (tokens per second)", "{:,.0f}".format)
    _bars(axes["D"], study, at("decoding", "1"), "decoding one sequence (tokens per second)", "{:,.0f}".format, names=False)
    kept = [Figure({0: model[f"bytes_at_{LONG}"] / KIB}) for model in study["models"].values()]
    label = f"kept for decoding at {LONG:,} tokens\n(KiB per sequence, less is better)"
    _draw_bars(axes["E"], study, kept, label, "{:,.0f}".format, names=False)
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
    carried = [(f"{STAGE_NAMES[stage]}, memory carried", stage, CARRIED_LOSS) for stage in (TRAINING, ORPO)]
    _pairs(losses, study, stages, "validation loss (nats per token)", carried)
    losses.set_title("held-out documents", fontsize=LARGE)
    found = [(f"{when} stage 2", ORPO, at("preference", when, "margin")) for when in ("before", "after")]
    _pairs(margins, study, found, "log odds, true minus own continuation")
    margins.set_title("held-out pairs", fontsize=LARGE)
    margins.set_yticklabels([])
    for axes, columns in ((losses, 2), (margins, 1)):
        axes.legend(handles=_grey(axes), fontsize=SMALL, loc="upper left", bbox_to_anchor=(0, -0.13), ncols=columns)
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
    _losses(left, study, TRAINING, "validation loss after equal tokens")
    _say_how_it_read(left, study, ncols=1)
    _bars(right, study, at("tokens_per_second"), "training (tokens per second)", "{:,.0f}".format, names=False)
    _losses(below, study, ORPO, "validation loss after ORPO")
    _bars(last, study, at("decoding", "1"), "decoding one sequence\n(tokens per second)", "{:,.0f}".format, names=False)
    save(canvas, path)


def _table(axes: Axes, study: Study) -> None:
    axes.axis("off")
    columns: list[tuple[str, Callable[[str], str]]] = [
        ("parameters", lambda model: f"{study['models'][model]['parameters']:,}"),
        ("loss, stage 1", lambda model: text_of(study, model, TRAINING, LOSS, "{:.3f}".format)),
        ("perplexity", lambda model: text_of(study, model, TRAINING, at("held_out", "perplexity"), "{:,.1f}".format)),
        ("bits per byte", lambda model: text_of(study, model, TRAINING, at("held_out", "bits_per_byte"), "{:.3f}".format)),
        ("loss, stage 2", lambda model: text_of(study, model, ORPO, LOSS, "{:.3f}".format)),
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


def _losses(axes: Axes, study: Study, stage: str, label: str, *, names: bool = True) -> None:
    """A dot for each model with the spread over seeds, and a diamond where it has been evaluated with its memory carried."""
    n_seeds = 0
    for place, model in enumerate(study["models"]):
        style = {"color": COLOURS[place % len(COLOURS)], "linestyle": "none", "capsize": 4}
        anew, carried = (over_seeds(study, model, stage, find) for find in (LOSS, CARRIED_LOSS))
        if anew is None:
            axes.annotate("-", (0.5, place), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL)
            continue
        n_seeds = max(n_seeds, len(anew.of_seeds))
        axes.errorbar(anew.mean, place, xerr=anew.spread or 0.0, marker="o", markersize=8, **style)
        behind = carried is not None and carried.mean > anew.mean
        _number(axes, anew, place, left=behind)
        if carried is not None:
            hollow = {"marker": "D", "markersize": 8, "markerfacecolor": "white"}
            axes.errorbar(carried.mean, place, xerr=carried.spread or 0.0, **hollow, **style)
            _number(axes, carried, place, left=not behind)
    _name_models(axes, study, names=names)
    axes.margins(x=0.2)
    of_seeds = f"± over {n_seeds} seeds" if n_seeds > 1 else "one seed"
    axes.set_xlabel(f"{label}\n(nats per token, less is better; {of_seeds})", fontsize=MEDIUM)


def _number(axes: Axes, figure: Figure, place: float, *, left: bool) -> None:
    """The mean beside its interval."""
    spread, side, align = figure.spread or 0.0, -1 if left else 1, "right" if left else "left"
    at_end = {"xytext": (8 * side, 0), "textcoords": "offset points", "va": "center", "ha": align}
    axes.annotate(f"{figure.mean:.3f}", (figure.mean + side * spread, place), fontsize=SMALL, **at_end)


def _say_how_it_read(axes: Axes, study: Study, *, ncols: int) -> None:
    """Above, what the markers of losses mean; nothing where no model has been evaluated in both ways."""
    from matplotlib.lines import Line2D

    if all(over_seeds(study, model, TRAINING, CARRIED_LOSS) is None for model in study["models"]):
        return
    style = {"color": "0.35", "linestyle": "none", "markersize": 8}
    handles = [
        Line2D([], [], marker="o", label="every piece of text read anew", **style),
        Line2D([], [], marker="D", markerfacecolor="white", label="memory carried, as “SMT, carried” is trained", **style),
    ]
    axes.legend(handles=handles, fontsize=SMALL, loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, frameon=False)


def _name_models(axes: Axes, study: Study, *, names: bool) -> None:
    """A line for each model, the first above."""
    labels = [NAMES[model] for model in study["models"]] if names else [""] * len(study["models"])
    axes.set_yticks(range(len(labels)), labels, fontsize=MEDIUM)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.grid(alpha=0.3, axis="x")


def _bars(
    axes: Axes,
    study: Study,
    find: Callable[..., Any],
    label: str,
    show: Callable[[float], str],
    *,
    names: bool = True,
) -> None:
    figures = [over_seeds(study, model, TRAINING, find) for model in study["models"]]
    _draw_bars(axes, study, figures, label, show, names=names)


def _draw_bars(
    axes: Axes,
    study: Study,
    figures: Sequence[Figure | None],
    label: str,
    show: Callable[[float], str],
    *,
    names: bool = True,
) -> None:
    """A bar from zero for each model."""
    values = [0.0 if figure is None else figure.mean for figure in figures]
    errors = [(figure.spread if figure is not None else None) or 0.0 for figure in figures]
    shown = {"xerr": errors, "error_kw": {"ecolor": "0.25", "capsize": 4}} if any(errors) else {}
    axes.barh(range(len(values)), values, color=COLOURS[: len(values)], **shown)
    for place, (value, error, figure) in enumerate(zip(values, errors, figures, strict=True)):
        axes.annotate(
            "-" if figure is None else show(value), (value + error, place), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=SMALL,
        )  # fmt: skip
    _name_models(axes, study, names=names)
    axes.margins(x=0.2)
    axes.set_xlabel(label, fontsize=MEDIUM)


def _pairs(
    axes: Axes,
    study: Study,
    found: Sequence[tuple[str, str, Callable[..., Any]]],
    label: str,
    carried: Sequence[tuple[str, str, Callable[..., Any]]] = (),
) -> None:
    """Two dots for each model, before and after, joined; ``carried``: below them, two diamonds, where a model has those."""
    for place, model in enumerate(study["models"]):
        colour = COLOURS[place % len(COLOURS)]
        for kind, markers, height in ((found, "os", place), (carried, "Dd", place + 0.25)):
            figures = [over_seeds(study, model, stage, find) for _, stage, find in kind]
            there = [figure for figure in figures if figure is not None]
            axes.plot([figure.mean for figure in there], [height] * len(there), color=colour, linewidth=1, alpha=0.5)
            for marker, face, (name, _, _), figure in zip(markers, ("white", colour), kind, figures, strict=False):
                if figure is not None:
                    style = {"color": colour, "marker": marker, "markersize": 8, "markerfacecolor": face, "capsize": 4}
                    axes.errorbar(figure.mean, height, xerr=figure.spread or 0.0, linestyle="none", **style, label=name)
    _name_models(axes, study, names=True)
    axes.set_xlabel(label, fontsize=MEDIUM)
    axes.grid(alpha=0.3)


def _grey(axes: Axes) -> list[Line2D]:
    """What the markers of pairs mean, in the colour of no model."""
    from matplotlib.lines import Line2D

    shown = {name: drawn.lines[0] for drawn, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    style = {"color": "0.35", "linestyle": "none", "markersize": 8}
    hollow = {
        name: {"markerfacecolor": "white"} if line.get_markerfacecolor() == "white" else {} for name, line in shown.items()
    }
    return [Line2D([], [], marker=line.get_marker(), label=name, **style, **hollow[name]) for name, line in shown.items()]


def save(canvas: Canvas, path: str | Path) -> None:
    """Write a picture of a study as PNG."""
    canvas.savefig(path, dpi=110)
