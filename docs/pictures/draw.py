"""Who sees whom, as pictures: ``python docs/pictures/draw.py`` writes an SVG for every operation, from ``WindowSpec`` alone.

Windows are small, so that single entries can be seen; the shapes are those of the real one (15 slots, 50 tokens, stride 16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from smt_kernels import WindowSpec

FOLDER = Path(__file__).resolve().parent
CELL, GAP, LEFT, TOP, LINE = 15, 14, 116, 50, 22
TOKEN, SLOT, NEWEST, PALE, EMPTY = "#0072B2", "#D55E00", "#009E73", "#9ecae1", "#eceff1"
BOTH = f"{TOKEN} {PALE}"  # two colours, each in one half of the cell
SMALL = WindowSpec(n_memory=3, n_tokens=8, stride=4)


@dataclass(frozen=True)
class Columns:
    """Entries side by side: a title and a label for each."""

    title: str
    labels: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A grid: a row for each query, columns in groups, and the colour (and text) of every cell that is not empty."""

    rows_title: str
    rows: Sequence[str]
    columns: Sequence[Columns]
    cells: dict[tuple[int, int, int], tuple[str, str]]  # (row, group, column) -> colour or two, text
    legend: dict[str, str]  # colour or two -> meaning
    parted: int | None = None  # a gap before this row

    def svg(self) -> str:
        """The file."""
        starts, x = [], LEFT
        for group in self.columns:
            starts.append(x)
            x += max(CELL * len(group.labels), 7 * len(group.title)) + GAP
        width, legend_top = x + 6, self._top_of(len(self.rows)) + 14
        places = self._legend_places(width)
        height = legend_top + LINE * (1 + max(line for _, line in places))
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{LEFT - 8}" y="{TOP - 9}" text-anchor="end" font-weight="bold">{escape(self.rows_title)}</text>',
        ]
        for group, start in zip(self.columns, starts, strict=True):
            parts.append(f'<text x="{start}" y="20" font-weight="bold">{escape(group.title)}</text>')
            for column, label in enumerate(group.labels):
                middle = start + CELL * column + CELL / 2
                parts.append(f'<text x="{middle}" y="{TOP - 9}" text-anchor="middle" font-size="9">{escape(label)}</text>')
        squares: dict[str, str] = {}  # one path for each colour
        texts = []
        for row, label in enumerate(self.rows):
            y = self._top_of(row)
            parts.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end" font-size="11">{escape(label)}</text>')
            for number, (group, start) in enumerate(zip(self.columns, starts, strict=True)):
                for column in range(len(group.labels)):
                    colours, text = self.cells.get((row, number, column), (EMPTY, ""))
                    x = start + CELL * column
                    for colour, shape in _halves(colours, x, y, CELL - 1):
                        squares[colour] = squares.get(colour, "") + shape
                    if text:
                        place = f'x="{x + CELL / 2 - 0.5}" y="{y + 11}" text-anchor="middle" font-size="9"'
                        texts.append(f'<text {place} fill="white">{escape(text)}</text>')
        parts += [f'<path fill="{colour}" d="{path}"/>' for colour, path in squares.items()] + texts
        for (colours, meaning), (x, line) in zip(self.legend.items(), places, strict=True):
            y = legend_top + LINE * line
            parts += [f'<path fill="{colour}" d="{shape}"/>' for colour, shape in _halves(colours, x, y, 13)]
            parts.append(f'<text x="{x + 18}" y="{y + 11}">{escape(meaning)}</text>')
        return "\n".join([*parts, "</svg>"]) + "\n"

    def _top_of(self, row: int) -> int:
        """The upper edge of a row."""
        return TOP + CELL * row + (GAP // 2 if self.parted is not None and row >= self.parted else 0)

    def _legend_places(self, width: float) -> list[tuple[int, int]]:
        """Where each meaning begins, x and line: as many on a line as the grid is wide."""
        places, x, line = [], GAP, 0
        for meaning in self.legend.values():
            needed = 34 + 7 * len(meaning)
            if x > GAP and x + needed > width:
                x, line = GAP, line + 1
            places.append((x, line))
            x += needed
        return places


def stream_attention(spec: WindowSpec = SMALL, n_steps: int = 24) -> Picture:
    """Every step sees the last slots written before it and the last tokens; a slot sees itself and the slots before it."""
    slots, among_slots = range(spec.writes_made(n_steps)), WindowSpec(0, spec.n_memory, None)
    of_slots = ((n_steps + slot, among_slots.visible_tokens(slot)) for slot in slots)
    return Picture(
        "query of step",
        [*map(str, range(n_steps)), *(f"of slot {slot}" for slot in slots)],
        [_columns("slot", slots), _columns("token", range(n_steps))],
        {
            **_seen(((step, spec.visible_slots(step)) for step in range(n_steps)), 0, slots, SLOT),
            **_seen(((step, spec.visible_tokens(step)) for step in range(n_steps)), 1, range(n_steps), TOKEN),
            **_seen(of_slots, 0, slots, SLOT),
        },
        {SLOT: "slots that it sees", TOKEN: "tokens that it sees"},
        parted=n_steps,
    )


def stride_encoding(spec: WindowSpec = SMALL, n_steps: int = 25) -> Picture:
    """The steps of a block share one window, which ends with the block."""
    steps, slots = range(n_steps), range(spec.writes_made(n_steps))
    windows = [(step, spec.block_end(spec.block_of(step))) for step in steps]
    queries = ((step, (spec.visible_tokens(end)[0], step + 1)) for step, end in windows)
    return Picture(
        "query of step",
        [f"{step}, block {spec.block_of(step)}" for step in steps],
        [_columns("slot", slots), _columns("token", steps)],
        {
            **_seen(((step, spec.visible_slots(end)) for step, end in windows), 0, slots, SLOT),
            **_seen(queries, 1, steps, TOKEN),
        },
        {SLOT: "slots of its window", TOKEN: "tokens of its window, up to itself"},
    )


def window_attention(n_memory: int = 4, n_tokens: int = 12, valid_memory: int = 2, valid_tokens: int = 9) -> Picture:
    """Inside one window: entries that exist, up to the query."""
    size = n_memory + n_tokens
    exists = [index >= n_memory - valid_memory if index < n_memory else index >= size - valid_tokens for index in range(size)]
    cells = {}
    for query in range(size):
        for key in range(query + 1):
            if exists[key]:
                memory = key < n_memory
                cells[query, 0 if memory else 1, key if memory else key - n_memory] = (SLOT if memory else TOKEN, "")
    return Picture(
        "query entry",
        [f"{'slot' if index < n_memory else 'token'} {index}" for index in range(size)],
        [_columns("slots", range(n_memory)), _columns("tokens", range(n_memory, size))],
        cells,
        {SLOT: "slots that exist", TOKEN: "tokens that exist", EMPTY: "later, or not there yet"},
    )


def stream_attention_decode(spec: WindowSpec = SMALL, first: int = 9, n_steps: int = 9) -> Picture:
    """Rings: what each cell holds at consecutive steps of one row."""
    cells = {}
    for row, step in enumerate(range(first, first + n_steps)):
        for group, (size, stop, colour) in enumerate(
            [(spec.n_memory, spec.writes_before(step), SLOT), (spec.n_tokens, step + 1, TOKEN)]
        ):
            for entry in range(max(0, stop - size), stop):
                newest = entry == stop - 1
                cells[row, group, entry % size] = (NEWEST if newest else colour, str(entry))
    return Picture(
        "at step",
        [str(step) for step in range(first, first + n_steps)],
        [_columns("ring of slots", range(spec.n_memory)), _columns("ring of tokens", range(spec.n_tokens))],
        cells,
        {SLOT: "a slot, by number", TOKEN: "a token, by step", NEWEST: "the newest", EMPTY: "not there yet"},
    )


def attention_pool(spec: WindowSpec = SMALL, n_writes: int = 8, group: int = 2) -> Picture:
    """What each write pools: the last slots of earlier groups, and the last tokens."""
    writes, tokens = range(n_writes), range(spec.write_step(n_writes - 1) + 1)
    return Picture(
        "write, at step",
        [f"{write}, {spec.write_step(write)}" for write in writes],
        [_columns("slot", writes), _columns("token", tokens, every=spec.stride)],
        {
            **_seen(((write, spec.pooled_slots(write, group)) for write in writes), 0, writes, SLOT),
            **_seen(((write, spec.visible_tokens(spec.write_step(write))) for write in writes), 1, tokens, TOKEN),
        },
        {SLOT: f"slots of earlier groups of {group}", TOKEN: "tokens"},
    )


def stride_write(n_writes: int = 8, taps: int = 4, off: Sequence[int] = (4,)) -> Picture:
    """What the output of each write depends on: taps of its convolution, and what earlier writes put into the state.

    All taps but its own x were taps of an earlier write, too, and act through the state besides. A gated write passes.
    """
    history, on = taps - 1, [write for write in range(n_writes) if write not in off]
    cells: dict[tuple[int, int, int], tuple[str, str]] = {}
    for write in on:
        inputs = [(0, index) for index in range(history)] + [(1, earlier) for earlier in on if earlier <= write]
        for group, column in inputs:
            cells[write, group, column] = (PALE, "")
        for group, column in inputs[-taps:]:
            cells[write, group, column] = (TOKEN if write == on[0] or (group, column) == inputs[-1] else BOTH, "")
        cells[write, 2, 0] = (SLOT, "")
    return Picture(
        "output of write",
        [f"{write}{'  (gate off)' if write in off else ''}" for write in range(n_writes)],
        [_columns("before", range(-history, 0)), _columns("x and z of write", range(n_writes)), Columns("h", [""])],
        cells,
        {
            TOKEN: "through its convolution",
            BOTH: "through both",
            PALE: "through the state",
            SLOT: "the state from before",
        },
    )


PICTURES: dict[str, Callable[[], Picture]] = {
    function.__name__: function
    for function in (stream_attention, stride_encoding, window_attention, stream_attention_decode, attention_pool, stride_write)
}


def _halves(colours: str, x: float, y: float, size: int) -> list[tuple[str, str]]:
    """The square of one colour, or the two halves of two, as paths."""
    first, *second = colours.split()
    if not second:
        return [(first, f"M{x} {y}h{size}v{size}h{-size}z")]
    return [(first, f"M{x} {y}h{size}l{-size} {size}z"), (second[0], f"M{x + size} {y}v{size}h{-size}z")]


def _columns(title: str, entries: Sequence[int], every: int = 1) -> Columns:
    return Columns(title, [str(entry) if entry % every == 0 else "" for entry in entries])


def _seen(
    ranges: Iterator[tuple[int, tuple[int, int]]], group: int, entries: range, colour: str
) -> dict[tuple[int, int, int], tuple[str, str]]:
    """Cells of the entries [start, stop) that each row sees, of those that exist."""
    return {
        (row, group, entry): (colour, "")
        for row, (start, stop) in ranges
        for entry in range(max(start, entries.start), min(stop, entries.stop))
    }


if __name__ == "__main__":
    for name, picture in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(picture().svg(), encoding="utf-8")
        print(FOLDER / f"{name}.svg")
