"""The tables of a GPU's report (``benchmarks/results/card.json``, which ``bench_card.py`` writes): ratios, and every row."""

from __future__ import annotations

from typing import Any

from bench_card import COLUMNS, as_cells, ceilings_line
from card_rows import Row
from committed import read

# Of the README's table: what it is called there, section, our case, against what.
SPEED = (
    ("training step, `stream`", "training step", "SMT stream", "compiled GPT-2, flash attention"),
    ("training step, no writes", "training step", "SMT stream, no writes", "compiled GPT-2, flash attention"),
    ("training step, pools tokens", "training step", "SMT stream, pools tokens", "compiled GPT-2, flash attention"),
    ("attention, forward", "attention, forward", "stream_attention", "SDPA, full causal"),
    ("attention, forward + backward", "attention, forward + backward", "stream_attention", "SDPA, full causal"),
    ("loss, forward + backward", "loss, forward + backward", "linear_cross_entropy", "compiled linear + cross-entropy"),
)


def speed_table() -> str:
    """Ratios to what a user would take instead, a line for each shape."""
    document = read("card")
    device = document["environment"]["device"]
    lines = [f"| {device}, bf16 | against | batch x length | theirs | ours | ratio |", "|---" * 6 + "|"]
    for name, section, case, against in SPEED:
        rows = [Row(**row) for row in document["rows"] if row["section"] == section]
        for row in rows:
            if row.case != case or row.ratio is None or "float32" in row.shape:
                continue
            theirs = next(other for other in rows if other.shape == row.shape)
            times = (_milliseconds(x.seconds) for x in (theirs, row))
            lines.append(f"| {' | '.join((name, against, row.shape, *times, f'{row.ratio:.2f}x'))} |")
    return "\n".join(lines)


def report(*words: str) -> str:
    """Every row of the sections that begin with these words, and what they were measured on."""
    document, section = read("card"), " ".join(words)
    rows = [Row(**row) for row in document["rows"] if row["section"].startswith(section)]
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
