"""The plots of README and docs, drawn from committed results. Each file keeps a digest of the figures that it shows."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from committed import (
    CACHE,
    FLEX,
    FULL,
    GPT2,
    MAMBA,
    ROOT,
    STATIC_CACHE,
    STREAM,
    STREAM_ATTENTION,
    STRIDE,
    VARIANTS,
    read,
    study,
)
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from report import COLOURS, MARKERS

SPEED, MEMORY = (ROOT / "docs" / "pictures" / f"{name}.svg" for name in ("speed", "memory"))
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "smt"}


def digest(plot: Path) -> str:
    """What tells the figures behind a plot apart; kept in its file."""
    sources = (
        [study("memory")]
        if plot == MEMORY
        else [read(name)["rows"] for name in ("attention_cpu", "training_cpu", "decoding_cpu")]
    )
    return hashlib.sha256(repr(sources).encode()).hexdigest()[:16]


def draw_speed(path: Path = SPEED) -> None:
    """Time per token over length: attention, a training step, and decoding after a long past."""
    panels = {
        "attention, forward": (
            "attention_cpu",
            "Forward:",
            {FULL: "full attention", FLEX: "FlexAttention, same mask", STREAM_ATTENTION: "stream_attention"},
        ),
        "training step": ("training_cpu", "Training", {GPT2: "GPT-2", STREAM: "stream", STRIDE: "stride"}),
        "decoding a token": (
            "decoding_cpu",
            "Decoding",
            {CACHE: "GPT-2, KV cache", STATIC_CACHE: "GPT-2, static cache", MAMBA: "Mamba", STREAM: "stream"},
        ),
    }
    styles = {FULL: 0, GPT2: 0, CACHE: 0, STATIC_CACHE: 4, STREAM_ATTENTION: 1, STREAM: 1, STRIDE: 2, FLEX: 3, MAMBA: 3}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.5), layout="constrained")
        for panel, (title, (name, task, cases)) in zip(axes, panels.items(), strict=True):
            rows = [row for row in read(name)["rows"] if row["task"].startswith(task) and row["batch"] == 1]
            for case, label in cases.items():
                points = [
                    (row["length"], 1e3 * row.get("seconds_per_token", row["seconds"] / row["length"]))
                    for row in rows
                    if row["case"] == case and row.get("seconds") is not None
                ]
                look = {"color": COLOURS[styles[case]], "marker": MARKERS[styles[case]], "lw": 1.8, "ms": 6}
                panel.plot(*zip(*points, strict=True), label=label, **look)
            lengths = sorted({row["length"] for row in rows})
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            low, high = panel.dataLim.intervaly
            panel.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 10 * low else (1,)))
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.minorticks_off()
            panel.set_ylim(low / 1.5, high * (high / low) ** 0.6)  # the legend covers no curve
            panel.set_title(title, loc="left", fontweight="bold", fontsize=12)
            panel.set_xlabel("tokens of past" if task == "Decoding" else "tokens in the sequence")
            panel.grid(axis="y", lw=0.5, color="0.88")
            panel.legend(frameon=False, fontsize=10, loc="upper left")
        axes[0].set_ylabel("milliseconds per token\n(two CPU cores)")
        _save(figure, path, SPEED)


def draw_memory(path: Path = MEMORY) -> None:
    """Loss of each variant of the study on source code minus that of no writes, after equal tokens and after equal time."""
    cells = study("memory")
    variants = [name for name in VARIANTS if name != "no_writes" and ("equal_tokens", name) in cells]
    titles = {"equal_tokens": "after equal tokens", "equal_time": "after equal time"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True, sharex=True, layout="constrained")
        for panel, (budget, title) in zip(axes, titles.items(), strict=True):
            of = [cells[budget, name] for name in variants]
            differences, errors = ([float(cell[column]) for cell in of] for column in ("difference", "± s.e."))
            colours = [COLOURS[1] if value < 0 else COLOURS[2] for value in differences]
            bars = panel.barh(range(len(of)), differences, xerr=errors, color=colours, height=0.65)
            panel.bar_label(bars, [f"{value:+.3f}" for value in differences], padding=4, fontsize=10)
            panel.axvline(0, color="0.3", lw=1)
            panel.margins(x=0.2)
            panel.set_title(title, loc="left", fontweight="bold", fontsize=12)
            panel.set_xlabel("loss minus that of no writes (nats per token)\nleft of 0 is better")
        axes[0].set_yticks(range(len(variants)), [re.sub(r"[`*]", "", VARIANTS[name]) for name in variants])
        axes[0].invert_yaxis()
        _save(figure, path, MEMORY)


def _save(figure: Figure, path: Path, plot: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Description": f"figures {digest(plot)}"} if path.suffix == ".svg" else None)
    plt.close(figure)
