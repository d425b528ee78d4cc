"""Deprecations that calls of this repository cause, and no others: what libraries do to each other is theirs to mend.

Who causes one is told as Python tells it: the first caller outside the module that warns. That is where ``stacklevel`` points
a warning, so the filters of warnings go by the names of our modules. Where a library logs instead (``transformers``), the
stack says it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CATEGORIES = ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning")
LOGGING = ("accelerate", "datasets", "transformers")  # libraries that log some of their deprecations
ROOT = Path(__file__).parents[1]
# Packages, and modules of tests and benchmarks, which are imported by their bare names.
_NAMES = {"smt", "smt_kernels", *(path.stem for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))}
OURS = re.compile(rf"({'|'.join(sorted(_NAMES))})(\.|$)")


def filters() -> Iterator[str]:
    """Lines of pytest's ``filterwarnings`` by which such a warning is an error; torch warns in C++ by a plain UserWarning."""
    for category in CATEGORIES:
        yield f"error::{category}:{OURS.pattern}"
    yield f"error:.*[Dd]eprecated:UserWarning:{OURS.pattern}"


@contextmanager
def logged(libraries: tuple[str, ...] = LOGGING) -> Iterator[list[str]]:
    """A list that receives what libraries log of deprecations that we cause while the block runs."""
    handler = _Handler()
    for name in libraries:
        logging.getLogger(name).addHandler(handler)
    try:
        yield handler.messages
    finally:
        for name in libraries:
            logging.getLogger(name).removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage().lower() and OURS.match(_caller(record.name)):
            self.messages.append(record.getMessage())


def _caller(module: str) -> str:
    """The module that called into ``module``, which is logging now; loggers bear the names of their modules."""
    frame = sys._getframe()
    for inside in (False, True):
        while frame is not None and (frame.f_globals.get("__name__") == module) is inside:
            frame = frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__", "")
