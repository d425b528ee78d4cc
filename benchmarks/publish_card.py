"""The tables of reports of GPUs (``bench_card.py`` writes them; ``benchmarks/results/card_*.json``): ratios, and every row."""

from __future__ import annotations

from typing import Any

from bench_card import COLUMNS, as_cells, ceilings_line
from card_rows import Row
from committed import read
from names import CARD_ATTENTION, CARD_FULL, CARD_GROUPS, CARD_NO_WRITES, POOLS_TOKENS, STREAM

# Of the README's table: report, what it is called there, section, our case, against what.
COMPILED_GPT2 = "compiled GPT-2"
LENGTH = "8 x 4,096"  # of training steps
SPEED = (
    ("card_h100", "training step, `stream`", "training step", STREAM, COMPILED_GPT2),
    ("card_h100", "training step, groups of 32 writes", "training step", CARD_GROUPS, COMPILED_GPT2),
    ("card_h100", "training step, pools tokens", "training step", POOLS_TOKENS, COMPILED_GPT2),
    ("card_h100", "training step, no writes", "training step", CARD_NO_WRITES, COMPILED_GPT2),
    ("card_h200", "attention, forward", "attention, forward", CARD_ATTENTION, CARD_FULL),
    ("card_h200", "attention, forward + backward", "attention, forward + backward", CARD_ATTENTION, CARD_FULL),
    (
        "card_h200",
        "loss, forward + backward",
        "loss, forward + backward",
        "linear_cross_entropy",
        "compiled linear + cross-entropy",
    ),
)


def speed_table() -> str:
    """Ratios to what a user would take instead."""
    lines = ["| bf16 | on | against | batch x length | theirs | ours | ratio |", "|---" * 7 + "|"]
    for report, name, section, case, against in SPEED:
        document = read(report)
        device = document["environment"]["device"].split()[1]  # of "NVIDIA H100 80GB HBM3"
        rows = [Row(**row) for row in document["rows"] if row["section"] == section]
        for row in rows:
            if row.case != case or row.ratio is None or "float32" in row.shape:
                continue
            if section == "training step" and row.shape != LENGTH:
                continue
            theirs = next(other for other in rows if other.shape == row.shape)
            times = (_milliseconds(x.seconds) for x in (theirs, row))
            lines.append(f"| {' | '.join((name, device, against, row.shape, *times, f'{row.ratio:.2f}x'))} |")
    return "\n".join(lines)


def report(name: str) -> str:
    """Every row of a report, and what they were measured on."""
    document = read(name)
    rows = [Row(**row) for row in document["rows"]]
    lines = []
    for title in dict.fromkeys(row.section for row in rows):
        lines += [f"**{title[0].upper()}{title[1:]}**", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join((row.case, row.shape, *as_cells(row)))} |" for row in rows if row.section == title]
        lines += [""]
    return "\n".join([*lines, _measured_on(document)])


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _measured_on(document: dict[str, Any]) -> str:
    described = document["environment"]
    versions = ", ".join(f"{name} {described[name]}" for name in ("torch", "triton", "transformers"))
    return f"{described['device']}, {versions}, {described['date']}; {ceilings_line(document['ceilings'])}."
