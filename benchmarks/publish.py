"""The tables and the plot that README and docs show, made from results that are committed: no figure is typed there.

    python benchmarks/bench_window.py --sections attention --threads 2 --json benchmarks/results/attention_cpu.json
    python benchmarks/publish.py

A page holds a table between ``<!-- made by benchmarks/publish.py: NAME -->`` and ``<!-- end -->``; NAME is one of ``TABLES``.
Measured figures come from ``benchmarks/results``, those of studies from ``benchmarks/studies``, claims are counted anew, and
budgets of kernels are those of ``kernel_budgets.yaml``. ``tests/test_documents.py`` fails where a page is behind its source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import claims
import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS, STUDIES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "studies"
PLOT = ROOT / "docs" / "pictures" / "speed.svg"
BLOCK = re.compile(r"(<!-- made by benchmarks/publish\.py: ([\w ]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)

FULL, STREAM_ATTENTION = "full causal (SDPA)", "stream_attention, blocked"
GPT2, CACHE, STATIC_CACHE = "GPT-2, full attention (Hugging Face)", "GPT-2, KV cache", "GPT-2, static KV cache"
STREAM, STRIDE, TOKEN, POOLS_TOKENS = "SMT stream", "SMT stride", "SMT token", "SMT stream, pools tokens"

# Variants of the studies in words.
VARIANTS = {
    "stream": "memory (`stream`)",
    "stream_pools_tokens": 'memory, `pool_source="tokens"`',
    "stride": "memory, `stride`",
    "token": "memory, `token`",
    "open_gates": "memory, open gates",
    "no_readout": "memory without readout",
    "silent_slots": "silent slots",
    "no_writes": "*no writes*",
    "no_writes_3_layers": "no writes, three layers",
    "silent_slots_window_of_112": "silent slots, window of 112",
    "sliding_window_of_40": "sliding window of 40, three layers",
    "gpt2_context_of_512": "GPT-2, full attention to 512",
}


def read(name: str) -> dict[str, Any]:
    """A result file by its name, without suffix."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def found(rows: list[dict], task: str, case: str, length: int, batch: int = 1) -> dict[str, Any]:
    """The row of one case at one length, of the task that begins with ``task``.

    Raises:
        ValueError: there is not exactly one.
    """
    wanted = (case, length, batch)
    matching = [row for row in rows if row["task"].startswith(task) and (row["case"], row["length"], row["batch"]) == wanted]
    if len(matching) != 1:
        raise ValueError(f"results must hold {task!r}, {case!r} at {length:,} once, got {len(matching)} rows")
    return matching[0]


def speed_table() -> str:
    """What is true today, one line each: the table of the README."""
    attention, training, decoding = (read(name)["rows"] for name in ("attention_cpu", "training_cpu", "decoding_cpu"))

    lines = [*_header("two CPU cores, fp32", "against", "short", "longer", "longest")]

    def add(what: str, against: str, rows: list[dict], task: str, case: str, lengths: tuple[int, ...]) -> None:
        cells = [f"{_times(found(rows, task, case, length)['ratio'])} at {length:,}" for length in lengths]
        lines.append(_line(what, against, *cells, *[""] * (3 - len(cells))))

    for what, task in (("attention, forward", "Forward:"), ("forward and backward", "Forward and backward")):
        add(what, "full causal attention", attention, task, STREAM_ATTENTION, (1024, 4096, 16384))
    for name, case in (("`stream`", STREAM), ("`stride`", STRIDE)):
        add(f"training step, {name}", "GPT-2", training, "Training", case, (2048, 8192))
    contexts = (1024, 4096, 65536)
    for name, case in (("KV cache", CACHE), ("static KV cache", STATIC_CACHE)):
        pairs = [[found(decoding, "Decoding", of, context) for of in (case, STREAM)] for context in contexts]
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
        cells = [f"{_times(ratio)} at {context:,}" for ratio, context in zip(ratios, contexts, strict=True)]
        lines.append(_line("decoding a token, `stream`", f"GPT-2, {name}", *cells))
    carried = [f"{_mib(ours)}, not {_mib(theirs)}" for theirs, ours in pairs]
    lines.append(_line("carried from token to token", "GPT-2, KV cache", *carried))
    lines.append(_line("anything on a GPU", "", "no committed report yet", "", ""))
    study = _study("memory")
    tokens, time = (study[budget, "stream"] for budget in ("equal_tokens", "equal_time"))
    return "\n".join(
        [
            *lines,
            "",
            f"Loss with memory against none, on source code: **{_difference(tokens)}** nats per token after equal tokens, "
            f"**{_difference(time)}** after equal time (below 0 is better).",
        ]
    )


def attention_table() -> str:
    """Attention alone."""
    rows = read("attention_cpu")["rows"]
    columns = ("length", "SDPA forward", "`stream_attention`", "ratio", "SDPA forward + backward", "`stream_attention`")
    lines = [*_header(*columns, "ratio", "limit")]
    for length in sorted({row["length"] for row in rows}):
        cells = [f"{length:,}"]
        for task in ("Forward:", "Forward and backward"):
            full, ours = (found(rows, task, case, length) for case in (FULL, STREAM_ATTENTION))
            cells += [_seconds(full), _seconds(ours), _times(ours.get("ratio"))]
        lines.append(_line(*cells, _times(found(rows, "Forward:", STREAM_ATTENTION, length)["flop_limit"])))
    return "\n".join(lines)


def training_table() -> str:
    """Training steps."""
    rows = read("training_cpu")["rows"]
    cases = {STRIDE: "`stride`", STREAM: "`stream`", POOLS_TOKENS: '`stream`, `pool_source="tokens"`'}
    lines = [*_header("length", "GPT-2", *cases.values())]
    for length in sorted({row["length"] for row in rows}):
        ours = [found(rows, "Training", case, length) for case in cases]
        cells = [f"{_seconds(row)} ({_times(row['ratio'])})" for row in ours]
        lines.append(_line(f"{length:,}", _seconds(found(rows, "Training", GPT2, length)), *cells))
    return "\n".join(lines)


def decoding_table() -> str:
    """Decoding."""
    rows = read("decoding_cpu")["rows"]
    names = ("context", "batch", "GPT-2, default cache", "GPT-2, static cache", "`stream`", "`stride`", "`token`")
    lines = [*_header(*names, "GPT-2 carries", "`stream` carries")]
    for length, batch in sorted({(row["length"], row["batch"]) for row in rows}, key=lambda pair: pair[::-1]):
        of = {row["case"]: row for row in rows if (row["length"], row["batch"]) == (length, batch)}
        times = [_per_token(of[case]) for case in (CACHE, STATIC_CACHE, STREAM, STRIDE, TOKEN)]
        times[2] += f" ({_times(of[STREAM]['ratio'])})"
        lines.append(_line(f"{length:,}", str(batch), *times, _mib(of[CACHE]), _mib(of[STREAM])))
    return "\n".join(lines)


def stdlib_sentence() -> str:
    """The default run."""
    results = read("stdlib")["results"]
    minutes, seconds = divmod(round(results["seconds"]), 60)
    return (
        f"`smt train` ends at **{results['val_bits_per_byte']:.2f} bits per byte** on held-out packages after "
        f"{results['steps']:,} steps, {minutes} min {seconds} s in all, at {results['tokens_per_second']:,.0f} tokens/s."
    )


def study_table(name: str) -> str:
    """A study's cells, a line for each variant and two columns for each budget."""
    cells, budgets = _study(name), yaml.safe_load((ROOT / "smt" / "studies" / f"{name}.yaml").read_text())["budgets"]
    shown = [" ".join(f"{value:,} {unit}" for unit, value in budget.items()) for budget in budgets.values()]
    lines = [*_header("", "parameters", shown[0], "to *no writes*", shown[1], "to *no writes*", "steps then")]
    for variant, title in VARIANTS.items():
        if ("equal_tokens", variant) not in cells:
            continue
        tokens, time = (cells[budget, variant] for budget in budgets)
        losses = [f"{float(cell['best loss']):.3f}" for cell in (tokens, time)]
        figures = [losses[0], _difference(tokens), losses[1], _difference(time), time["steps"]]
        lines.append(_line(title, tokens["parameters"], *figures))
    return "\n".join(lines)


def budgets_table(operation: str) -> str:
    """What the calls of an operation may take, and where they may take more."""
    budgets = yaml.safe_load((ROOT / "benchmarks" / "kernel_budgets.yaml").read_text(encoding="utf-8"))
    lines = [*_header("call", "launches", "bytes over the least", "FLOPs over the useful")]
    for call, figures in budgets["calls"].items():
        if call.split()[0] == operation:
            lines.append(_line(call, *(_budget(figures.get(name)) for name in ("launches", "bytes", "flops"))))
    notes = []
    for entry in budgets["exceeded"]:
        if entry["call"].split()[0] == operation:
            where = f" at size {', '.join(map(str, entry['sizes']))}" if "sizes" in entry else ""
            where += f" on {', '.join(entry['targets'])}" if "targets" in entry else ""
            notes.append(f"- {entry['call']}{where}: {entry['figure']} {entry['keeps']}: {entry['because']}.")
    return "\n".join([*lines, *(["", "What exceeds them today:", "", *notes] if notes else [])])


TABLES: dict[str, Callable[..., str]] = {
    "speed": speed_table,
    "attention": attention_table,
    "training": training_table,
    "decoding": decoding_table,
    "stdlib": stdlib_sentence,
    "study": study_table,
    "budgets": budgets_table,
    "claims": claims.as_markdown,
}


def pages() -> list[Path]:
    """README and docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with its tables made anew."""

    def fill(match: re.Match) -> str:
        name, *arguments = match[2].split()
        return f"{match[1]}\n{TABLES[name](*arguments)}\n\n{match[3]}"

    return BLOCK.sub(fill, text)


def plotted_digest() -> str:
    """What tells the results behind the plot apart, kept in its file."""
    digest = hashlib.sha256()
    for name in ("attention_cpu", "training_cpu", "decoding_cpu"):
        digest.update(json.dumps(read(name)["rows"], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def draw(path: Path) -> None:
    """Time per token over length: attention, a training step, and decoding after a long past."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator
    from report import COLOURS, MARKERS

    panels = {
        "attention, forward": ("attention_cpu", "Forward:", {FULL: "full attention", STREAM_ATTENTION: "this window"}),
        "training step": ("training_cpu", "Training", {GPT2: "GPT-2", STREAM: "stream", STRIDE: "stride"}),
        "decoding a token": (
            "decoding_cpu",
            "Decoding",
            {CACHE: "GPT-2, KV cache", STATIC_CACHE: "GPT-2, static cache", STREAM: "stream"},
        ),
    }
    styles = {FULL: 0, GPT2: 0, CACHE: 0, STATIC_CACHE: 4, STREAM_ATTENTION: 1, STREAM: 1, STRIDE: 2}
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "smt"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.5), layout="constrained")
        for panel, (title, (name, task, cases)) in zip(axes, panels.items(), strict=True):
            rows = [row for row in read(name)["rows"] if row["task"].startswith(task) and row["batch"] == 1]
            for case, label in cases.items():
                points = [
                    (row["length"], 1e3 * row.get("seconds_per_token", row["seconds"] / row["length"]))
                    for row in rows
                    if row["case"] == case and "seconds" in row
                ]
                look = {"color": COLOURS[styles[case]], "marker": MARKERS[styles[case]], "lw": 1.8, "ms": 6}
                panel.plot(*zip(*points, strict=True), label=label, **look)
            lengths = sorted({row["length"] for row in rows})
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            low, high = panel.dataLim.intervaly
            panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 10 * low else (1,)))
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.minorticks_off()
            panel.set_ylim(low / 1.5, high * (high / low) ** 0.6)  # the legend covers no curve
            panel.set_title(title, loc="left", fontweight="bold", fontsize=12)
            panel.set_xlabel("tokens of past" if task == "Decoding" else "tokens in the sequence")
            panel.grid(axis="y", lw=0.5, color="0.88")
            panel.legend(frameon=False, fontsize=10, loc="upper left")
        axes[0].set_ylabel("milliseconds per token")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Description": f"results {plotted_digest()}"})
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Fill the pages and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--no-plot", action="store_true", help="tables alone")
    options = parser.parse_args(arguments)
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            page.write_text(filled(text), encoding="utf-8")
            print(page.relative_to(ROOT))
    if not options.no_plot:
        draw(PLOT)
        print(PLOT.relative_to(ROOT))
    return 0


def _study(name: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a study's table by budget and variant."""
    lines = (STUDIES / f"{name}.md").read_text(encoding="utf-8").splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    return {tuple(row[0].split(",", 1)): dict(zip(header, row, strict=True)) for row in rows}


def _difference(cell: dict[str, str]) -> str:
    if cell["difference"] == "-":
        return "-"
    return f"{float(cell['difference']):+.3f} ± {float(cell['± s.e.']):.3f}"


def _seconds(row: dict[str, Any]) -> str:
    if row.get("not_measured"):
        return "not run"
    seconds = row["seconds"]
    shown = f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
    calls = row.get("repeats") or 0
    return shown + {1: " (one call)", 2: " (two calls)"}.get(calls, "")


def _per_token(row: dict[str, Any]) -> str:
    return f"{1e3 * row['seconds_per_token']:.3g} ms"


def _mib(row: dict[str, Any]) -> str:
    mib = row["state_bytes"] / 2**20
    return f"{mib:.2g} MiB" if mib < 10 else f"{mib:,.0f} MiB"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}x"


def _budget(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _header(*names: str) -> tuple[str, str]:
    return _line(*names), "|" + "---|" * len(names)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
