"""How far something is: a bar where somebody watches, and where nobody does a line every few seconds at most."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TextIO

from smt.runtime.process import is_watched

SECONDS_BETWEEN_LINES = 10.0


def progress_bar(stream: TextIO | None, done: float = 0.0) -> Bar | Lines:
    """What shows progress on ``stream``; None: nowhere.

    Args:
        done: share of the whole that was done before.
    """
    if is_watched(stream):
        return Bar(stream, done)
    return Lines(None if stream is None or stream.closed else stream, done)


class Bar:
    """A bar on a terminal."""

    def __init__(self, stream: TextIO, done: float = 0.0) -> None:
        from tqdm import tqdm

        # In hundredths of the whole, which may be bounded by time.
        style = {"bar_format": "{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}{postfix}", "initial": min(100.0, 100 * done)}
        self._bar = tqdm(total=100, file=stream, **style)

    def update(self, share: float, about: str) -> None:
        """Show that ``share`` of the whole is done, and a few words beside it."""
        self._bar.set_postfix_str(about, refresh=False)
        self._bar.update(min(100.0, 100 * share) - self._bar.n)

    def write(self, line: str) -> None:
        """Print a line on standard output; the bar goes on below it."""
        self._bar.write(line)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class Lines:
    """Lines in a file or a pipe, ``SECONDS_BETWEEN_LINES`` apart; the last one says where it ended.

    Args:
        now: tells the time in seconds.
    """

    def __init__(self, stream: TextIO | None, done: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._done, self._now = stream, done, now
        self._began = self._written = now()
        self._untold: tuple[float, str] | None = None

    def update(self, share: float, about: str) -> None:
        """Note that ``share`` of the whole is done, and a few words about it."""
        self._untold = min(1.0, share), about
        if self._now() - self._written >= SECONDS_BETWEEN_LINES:
            self._tell()

    def write(self, line: str) -> None:
        """Print a line on standard output."""
        print(line, flush=True, file=sys.stdout)

    def close(self) -> None:
        """Tell what has not been told."""
        if self._untold is not None:
            self._tell()

    def _tell(self) -> None:
        (share, about), self._untold, self._written = self._untold, None, self._now()
        passed = self._written - self._began
        remaining = f"{_clock(passed * (1 - share) / (share - self._done))} remaining" if share > self._done else "just begun"
        if self._stream is not None:
            with suppress(OSError):  # that nobody reads it any more, or the disk is full, must not end what is going on
                print(f"{share:4.0%}, {about}, {_clock(passed)} passed, {remaining}", file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
