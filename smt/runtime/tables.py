"""Tables of strings: columns for a terminal, and Markdown. The first row is the header."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from smt.runtime.names import in_markdown


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = (), *, rule: bool = False) -> str:
    """Columns two spaces apart.

    Args:
        rows: of one length, the header first.
        right: the columns that are flush right.
        rule: a line below the header.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if rule:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table in Markdown, whose marks are escaped in cells; arguments as ``aligned``."""
    header, *lines = ([in_markdown(cell) for cell in row] for row in rows)
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def shown_perplexity(value: float) -> str:
    """A perplexity in a cell; that of a model that has learned nothing can have hundreds of digits."""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"
