"""What standard output can show."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    """The text as standard output can show it: a sample may hold any character, a terminal need not."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)
