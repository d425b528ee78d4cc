"""What may be missing: optional packages, with an error that says how to install them, and results beside the main ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn the failed import of an optional package inside the block into an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f'{error.name} is not installed: pip install -e ".[{extra}]"') from error


@contextmanager
def optional(name: str) -> Iterator[None]:
    """Warn, and go on, where the block cannot make a plot or a sample: what it would show has been computed and is kept."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"there is no {name}: {type(error).__name__}: {error}", stacklevel=3)
