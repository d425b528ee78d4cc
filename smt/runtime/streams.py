"""Standard streams as a command can rely on them: whatever they are, it does not die of what it has to say.

A character that a stream cannot show becomes a question mark or its code. A stream that was closed before the command began is
nowhere. Where standard error fails in the middle, what is said there is lost and the command goes on; so it does where standard
output fails and the command leaves its results in files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def standard_streams(*, results_in_files: bool) -> Iterator[None]:
    """Make ``sys.stdin``, ``sys.stdout`` and ``sys.stderr`` such streams for as long as the block runs."""
    before = sys.stdin, sys.stdout, sys.stderr
    if None in before:
        # The first files that the command opens would take the numbers of standard streams, and what is said would go there.
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
    sys.stdin, output, errors = (
        open(os.devnull, mode, encoding="utf-8") if stream is None else stream  # noqa: SIM115  (open until the process ends)
        for stream, mode in zip(before, "rww", strict=True)
    )
    strict = [
        stream
        for stream in (output, errors)
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure")
    ]
    handlers = [stream.errors for stream in strict]
    for stream in strict:
        stream.reconfigure(errors="replace" if stream is output else "backslashreplace")
    sys.stdout, sys.stderr = Lasting(output) if results_in_files else output, Lasting(errors)
    try:
        yield
    finally:
        for stream in (output, errors):
            try:
                stream.flush()
            except (OSError, ValueError):  # or Python would complain once more when it closes the stream
                _lose(stream)
        for stream, handler in zip(strict, handlers, strict=True):
            with suppress(OSError, ValueError):
                stream.reconfigure(errors=handler)
        sys.stdin, sys.stdout, sys.stderr = before


class Lasting:
    """A text stream; what can no longer be written to it is lost, and nothing else."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``, or lose it."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            _lose(self._stream)
            return len(text)

    def flush(self) -> None:
        """Write what is held back, or lose it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _lose(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _lose(stream: Any) -> None:
    """Send to nowhere what the stream holds back and whatever is written to it later."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
