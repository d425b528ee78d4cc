"""Showing rows: a table for the terminal, JSON and CSV with the environment, and a plot of time per token and ratio."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("length", "case", "time", "per token", "tokens/s", "n", "ratio", "FLOP limit", "of limit", "published")
# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
OFF_SCALE = 50
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "legend.frameon": False}


def print_machine(described: dict[str, Any]) -> None:
    """What was measured on, and whether others are using it: with fewer free cores than threads, ratios mean little."""
    print("\n".join(f"{name:<13} {value}" for name, value in described.items()))
    load, cores = os.getloadavg()[0], described["cores"]
    if load > cores:
        print(f"\nThis machine is busy: on average {load:.1f} processes wanted its {cores} cores in the last minute.")
        print("Times are too high, and speed-ups mean little.")


def print_header(task: str, baseline: str, case_width: int, published: str) -> None:
    """The title and the column names of one table; arguments as ``print_rows``."""
    print(f"\n{task}; ratio = time of {baseline} / time of the case, n = calls timed in turns")
    print(_line(COLUMNS if published else COLUMNS[:-1], case_width))


def print_rows(rows: list[Row], case_width: int, published: str) -> None:
    """The rows of one length, ``published`` beside every ratio; "" where nothing was."""
    for row in rows:
        if row.not_measured is not None:
            print(f"{row.length:>7,}  {row.case:<{case_width}}  -- {row.not_measured}")
            continue
        cells = (
            f"{row.length:,}",
            row.case,
            _seconds(row.seconds),
            _seconds(row.seconds_per_token),
            f"{1 / row.seconds_per_token:,.0f}",
            str(row.repeats),
            "" if row.ratio is None else _times(row.ratio),
            "" if row.flop_limit is None else _times(row.flop_limit),
            "" if row.fraction_of_limit is None else f"{row.fraction_of_limit:.0%}",
            *(["" if row.ratio is None or row.flop_limit is None else published] if published else []),
        )
        print(_line(cells, case_width))
    print(flush=True)


def write_json(path: Path, environment: dict, settings: dict, rows: list[Row]) -> None:
    """Rows, settings and environment in one object."""
    document = {"environment": environment, "settings": settings, "rows": [row.as_dict() for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, environment: dict, settings: dict, rows: list[Row]) -> None:
    """One line per row after the environment and the settings as lines that begin with ``#``."""
    with path.open("w", encoding="utf-8", newline="") as file:
        for name, value in {**environment, **settings}.items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(row.as_dict() for row in rows)


def draw(path: Path, environment: dict, rows: list[Row], published: tuple[float, str]) -> None:
    """Per task, time per token and the ratio to the baseline with its FLOP limit, over length; only measured points are drawn.

    Args:
        published: the published ratio and its label, for a line across the panels of ratios.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row.task for row in rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(tasks), 2, figsize=(9.5, 3.1 * len(tasks) + 0.4), squeeze=False, layout="constrained")
        for (left, right), task in zip(axes, tasks, strict=True):
            of_task = [row for row in rows if row.task == task]
            _draw_times(left, task, of_task)
            _draw_ratios(right, of_task, published)
        _save(figure, path, environment)
        plt.close(figure)


def draw_decoding(path: Path, environment: dict, rows: list[Row]) -> None:
    """Per task (a batch size), time per decoded token and the bytes carried, over the context; only measured points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row.task for row in rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(tasks), 2, figsize=(9.5, 3.1 * len(tasks) + 0.4), squeeze=False, layout="constrained")
        for (left, right), task in zip(axes, tasks, strict=True):
            of_task = [row for row in rows if row.task == task]
            for index, case in enumerate(dict.fromkeys(row.case for row in of_task)):
                measured = [row for row in of_task if row.case == case and row.seconds is not None]
                line = {"marker": MARKERS[index], "color": COLOURS[index], "ms": 3.5, "lw": 1.2, "label": case}
                contexts = [row.length for row in measured]
                left.plot(contexts, [row.seconds_per_token * 1e3 for row in measured], **line)
                right.plot(contexts, [row.state_bytes / 2**20 for row in measured], **line)
            left.set_title(task.replace(": ", "\n", 1), loc="left")
            left.set(ylabel="ms per token", yscale="log")
            right.set_title("state or KV cache", loc="left")
            right.set(ylabel="MiB", yscale="log")
            for panel in (left, right):
                _finish(panel, of_task, "{:,g}", "context")
            left.legend(fontsize=7)
        _save(figure, path, environment)
        plt.close(figure)


def _save(figure: Figure, path: Path, environment: dict) -> None:
    """Write the figure, with what it was measured on below."""
    device = environment["processor"] if environment["device"] == "cpu" else environment["device"]
    figure.supxlabel(
        f"{device}, {environment['threads']} threads, torch {environment['torch']}, {environment['date']}, "
        f"revision {environment['revision']}",
        fontsize=7,
        color="0.4",
    )
    figure.savefig(path, dpi=180)


def _draw_times(axes: Axes, task: str, rows: list[Row]) -> None:
    for index, case in enumerate(dict.fromkeys(row.case for row in rows)):
        points = [(row.length, row.seconds_per_token * 1e6) for row in rows if row.case == case and row.seconds is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=MARKERS[index], color=COLOURS[index], ms=3.5, lw=1.2, label=case)
    axes.set_title(task.replace(": ", "\n", 1), loc="left")
    axes.set(ylabel="µs per token", yscale="log")
    _finish(axes, rows, "{:,g}")
    if axes.lines:
        axes.legend(fontsize=7)


def _draw_ratios(axes: Axes, rows: list[Row], published: tuple[float, str]) -> None:
    baseline = rows[0].case
    limits: dict[tuple, list[str]] = {}  # cases of one limit share one line
    for index, case in enumerate(dict.fromkeys(row.case for row in rows)):
        of_case = [row for row in rows if row.case == case]
        measured = [(row.length, row.ratio) for row in of_case if row.ratio is not None]
        if not measured:
            continue
        axes.plot(*zip(*measured, strict=True), marker=MARKERS[index], color=COLOURS[index], ms=3.5, lw=1.2)
        limit = tuple((row.length, row.flop_limit) for row in of_case if row.flop_limit is not None)
        if limit:
            limits.setdefault(limit, []).append(COLOURS[index])
    for limit, colours in limits.items():
        # A limit of one case has its colour, a shared one is grey.
        colour = colours[0] if len(colours) == 1 and len(limits) > 1 else "0.45"
        axes.plot(*zip(*limit, strict=True), ls=":", lw=1.2, color=colour)
    axes.plot([], [], ls=":", lw=1.2, color="0.45", label="limit by multiply-adds")
    # A claim far above everything measured would squeeze it into a corner.
    highest = max((row.flop_limit or row.ratio or 0.0 for row in rows), default=0.0)
    far = published[0] > OFF_SCALE * highest
    claim = {"color": "#882255", "lw": 1, "ls": "--"}
    if far:
        axes.plot([], [], label=f"{published[1]}, off the scale", **claim)
    else:
        axes.axhline(published[0], label=published[1], **claim)
    axes.set_title(f"speed-up over {baseline}", loc="left")
    axes.set(ylabel="ratio", yscale="log")
    _finish(axes, rows, "{:,g}x")
    axes.legend(fontsize=7, loc="best")


def _finish(axes: Axes, rows: list[Row], number: str, of: str = "sequence length") -> None:
    axes.yaxis.set_major_formatter(lambda value, position: number.format(value))
    lengths = sorted({row.length for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel(of)
    axes.grid(axis="y", lw=0.4, color="0.88")


def _line(cells: tuple[str, ...], case_width: int) -> str:
    length, case, *numbers = cells
    widths = (9, 9, 10, 3, 8, 10, 8, 9)
    aligned = (f"  {cell:>{width}}" for cell, width in zip(numbers, widths[: len(numbers)], strict=True))
    return f"{length:>7}  {case:<{case_width}}" + "".join(aligned)


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError("unreachable: microseconds take every value")


def _times(value: float) -> str:
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"
