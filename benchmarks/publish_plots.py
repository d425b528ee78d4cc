"""The plots of README and docs, drawn from committed results. Each file keeps a digest of the figures that it shows."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from committed import ROOT, VARIANTS, over_seeds, read, study
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MultipleLocator
from names import (
    CACHE,
    CARD_GPT2,
    CARD_GROUPS,
    CARD_NO_WRITES,
    FLEX,
    FULL,
    GPT2,
    MAMBA,
    POOLS_TOKENS,
    STATIC_CACHE,
    STREAM,
    STREAM_ATTENTION,
    STRIDE,
)
from report import COLOURS

SPEED, MEMORY, POSITION = (ROOT / "docs" / "pictures" / f"{name}.svg" for name in ("speed", "memory", "memory_by_position"))
# Before this many tokens of a document, intervals are wider than all differences.
FIRST_POSITION = 4
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "smt"}
# Ours are blue, and thicker than what they are compared with.
OURS, OURS_TOO = COLOURS[1], COLOURS[6]
LOOKS = {
    **{case: {"color": COLOURS[0], "marker": "o", "lw": 1.3, "ms": 5} for case in (FULL, GPT2, CACHE)},
    STATIC_CACHE: {"color": COLOURS[4], "marker": "v", "lw": 1.3, "ms": 5},
    **{case: {"color": COLOURS[3], "marker": "^", "lw": 1.3, "ms": 5} for case in (FLEX, MAMBA)},
    STRIDE: {"color": OURS_TOO, "marker": "D", "lw": 3, "ms": 6.5},
    **{case: {"color": OURS, "marker": "s", "lw": 3, "ms": 6.5} for case in (STREAM_ATTENTION, STREAM)},
}
CARD, CARD_SHAPE = "card_h100", "8 x 4,096"
CARD_CASES = {
    CARD_GPT2: "GPT-2, compiled",
    STREAM: "SMT stream (ours)",
    CARD_GROUPS: "SMT, groups of 32 writes (ours)",
    POOLS_TOKENS: "SMT, pools tokens (ours)",
    CARD_NO_WRITES: "SMT without memory (ours)",
}


def digest(plot: Path) -> str:
    """What tells the figures behind a plot apart; kept in its file."""
    if plot == SPEED:
        sources = [read(name)["rows"] for name in ("attention_cpu", "training_cpu", "decoding_cpu", CARD)]
    else:
        memory = study("memory")
        sources = [memory["over_seeds"] if plot == MEMORY else memory["differences_by_position"]]
    return hashlib.sha256(repr(sources).encode()).hexdigest()[:16]


def draw_speed(path: Path = SPEED) -> None:
    """Time per token over length: attention, a training step, and decoding after a long past; and a training step on a GPU."""
    panels = {
        "attention, forward": (
            "attention_cpu",
            "Forward:",
            {FULL: "full attention", FLEX: "FlexAttention, same mask", STREAM_ATTENTION: "SMT's stream_attention (ours)"},
        ),
        "training step": (
            "training_cpu",
            "Training",
            {GPT2: "GPT-2", STRIDE: "SMT stride (ours)", STREAM: "SMT stream (ours)"},
        ),
        "decoding a token": (
            "decoding_cpu",
            "Decoding",
            {CACHE: "GPT-2, KV cache", STATIC_CACHE: "GPT-2, static cache", MAMBA: "Mamba", STREAM: "SMT stream (ours)"},
        ),
    }
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 5.7), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(3.6, 2.1))
        axes = upper.subplots(1, len(panels))
        for panel, (title, (name, task, cases)) in zip(axes, panels.items(), strict=True):
            rows = [row for row in read(name)["rows"] if row["task"].startswith(task) and row["batch"] == 1]
            for case, label in cases.items():
                points = [
                    (row["length"], 1e3 * row.get("seconds_per_token", row["seconds"] / row["length"]))
                    for row in rows
                    if row["case"] == case and row.get("seconds") is not None
                ]
                panel.plot(*zip(*points, strict=True), label=label, ls=":" if len(points) < 4 else "-", **LOOKS[case])
                _say_where_it_ends(panel, label, points[-1], [row for row in rows if row["case"] == case])
            lengths = sorted({row["length"] for row in rows})
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            low, high = panel.dataLim.intervaly
            panel.set_xticks(lengths, [_short(length) for length in lengths])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 10 * low else (1,)))
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.minorticks_off()
            panel.set_ylim(low / 1.5, high * (high / low) ** 0.7)  # the legend covers no curve
            panel.set_title(title, loc="left", fontweight="bold", fontsize=12)
            panel.set_xlabel("tokens of past" if task == "Decoding" else "tokens in the sequence")
            panel.grid(axis="y", lw=0.5, color="0.88")
            panel.legend(frameon=False, fontsize=10, loc="upper left")
        axes[0].set_ylabel("milliseconds per token\n(two CPU cores)")
        _draw_card(lower.subplots())
        _footnote(figure, "Markers: what was measured; lines only join them.")
        _save(figure, path, SPEED)


def _say_where_it_ends(panel: Axes, label: str, last: tuple[int, float], rows: list[dict]) -> None:
    """Beside the last point of the curve ``label``, why the next length was not measured."""
    after = [row for row in rows if row["length"] > last[0]]
    if after:
        reason = f"{label}, {_short(after[0]['length'])}:\n{after[0]['not_measured']}".replace(" > ", ",\nlimit ")
        place = {"xytext": (-13, -6), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        panel.annotate(reason, last, fontsize=8, color="0.25", **place)


def _draw_card(axes: Axes) -> None:
    """A training step on a GPU: milliseconds of GPT-2 and of ours, a bar each."""
    document = read(CARD)
    rows = {row["case"]: row for row in document["rows"] if (row["section"], row["shape"]) == ("training step", CARD_SHAPE)}
    shown = [rows[case] for case in CARD_CASES]
    bars = axes.barh(
        range(len(shown)),
        [1e3 * row["seconds"] for row in shown],
        color=[OURS if row["case"].startswith("SMT") else COLOURS[0] for row in shown],
        height=0.68,
    )
    labels = [f"{1e3 * row['seconds']:.0f} ms" + (f", {row['ratio']:.2f}x as fast" if row["ratio"] else "") for row in shown]
    axes.bar_label(bars, labels, padding=4, fontsize=10)
    axes.set_yticks(range(len(shown)), list(CARD_CASES.values()))
    axes.invert_yaxis()
    axes.margins(x=0.24)
    described = document["environment"]
    device, date = described["device"].split()[1], described["date"].split()[0]
    axes.set_title(f"training step on one {device}", loc="left", fontweight="bold", fontsize=12)
    axes.set_title(f"{CARD_SHAPE} tokens, bf16, decoder of GPT-2 small, {date}", loc="right", fontsize=10, color="0.25")
    axes.set_xlabel("milliseconds, less is better")
    axes.grid(axis="x", lw=0.5, color="0.88")
    axes.set_axisbelow(True)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)


def draw_memory(path: Path = MEMORY) -> None:
    """Loss of each variant of the study on source code minus that of no writes, after equal tokens and after equal time."""
    found = over_seeds("memory")
    variants = [name for name in VARIANTS if name != "no_writes" and ("equal_tokens", name) in found]
    titles = {"equal_tokens": "after equal tokens", "equal_time": "after equal time"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True, sharex=True, layout="constrained")
        for panel, (budget, title) in zip(axes, titles.items(), strict=True):
            of = [found[budget, name]["difference"] for name in variants]
            differences, errors = [one.mean for one in of], [one.standard_error for one in of]
            colours = [COLOURS[1] if value < 0 else COLOURS[2] for value in differences]
            bars = panel.barh(range(len(of)), differences, xerr=errors, color=colours, height=0.65)
            panel.bar_label(bars, [f"{value:+.3f}" for value in differences], padding=4, fontsize=10)
            panel.axvline(0, color="0.3", lw=1)
            panel.margins(x=0.2)
            panel.set_title(title, loc="left", fontweight="bold", fontsize=12)
            panel.set_xlabel("loss minus that of no writes (nats per token)\nleft of 0 is better")
        axes[0].set_yticks(range(len(variants)), [_words(name) for name in variants])
        axes[0].invert_yaxis()
        _footnote(figure, f"Means of {of[0].n_samples} seeds. Whiskers: one standard error over seeds.")
        _save(figure, path, MEMORY)


def draw_memory_by_position(path: Path = POSITION) -> None:
    """How much more three variants lose than no writes after equal tokens, by tokens of the document before."""
    curves = study("memory")["differences_by_position"]["equal_tokens,no_writes"]
    looks = {
        "stream": {"color": OURS, "marker": "s", "lw": 2.6, "ms": 6},
        "no_writes_3_layers": {"color": COLOURS[2], "marker": "D", "lw": 1.5, "ms": 5},
        "silent_slots": {"color": "0.35", "marker": "o", "lw": 1.5, "ms": 5},
    }
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(11, 4.2), layout="constrained")
        for name, look in looks.items():
            curve = curves[f"equal_tokens,{name}"]
            bins = [
                (start, stop, of) for start, stop, of in zip(curve["edges"], curve["edges"][1:], curve["bins"], strict=False)
            ]
            shown = [(math.sqrt(start * (stop - 1)), of) for start, stop, of in bins if start >= FIRST_POSITION and of]
            axes.plot([x for x, _ in shown], [of["nats"] for _, of in shown], label=_words(name), **look)
            known = [(x, of["nats"], of["margin"]) for x, of in shown if of["margin"] is not None]
            x, mean, margin = zip(*known, strict=True)
            low, high = ([m + sign * by for m, by in zip(mean, margin, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=look["color"], alpha=0.16, lw=0)
        axes.axhline(0, color="0.3", lw=1)
        axes.set_xscale("log", base=2)
        starts = [start for start, *_ in bins if start >= FIRST_POSITION]
        axes.set_xticks(starts, [_short(start) for start in starts])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(MultipleLocator(0.1))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.1f}" if round(value, 2) else "0")
        axes.set_title("loss by position, after equal tokens", loc="left", fontweight="bold", fontsize=12)
        axes.set_xlabel("tokens of the document before")
        axes.set_ylabel("loss minus that of no writes\n(nats per token), below 0 is better")
        axes.grid(axis="y", lw=0.5, color="0.88")
        axes.legend(frameon=False, fontsize=10, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.0))
        n_seeds = over_seeds("memory")["equal_tokens", "stream"]["loss"].n_samples
        _footnote(figure, f"Means of {n_seeds} seeds. Shaded: 95 % intervals over documents; none where there is one alone.")
        _save(figure, path, POSITION)


def _words(variant: str) -> str:
    """A variant of a study without the marks of a table."""
    return re.sub(r"[`*]", "", VARIANTS[variant])


def _footnote(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=9, color="0.35", x=0.01, ha="left")


def _save(figure: Figure, path: Path, plot: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Description": f"figures {digest(plot)}"} if path.suffix == ".svg" else None)
    plt.close(figure)
