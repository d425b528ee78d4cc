"""What the Hugging Face Hub gives, from the cache of earlier downloads where it is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Loaded = TypeVar("Loaded")


def cached_first(load: Callable[[bool], Loaded], refusal: str) -> Loaded:
    """What ``load(local_files_only)`` gives: asking the Hub takes most of a minute where there is no network.

    Raises:
        ValueError: it fails both times; the message begins with ``refusal`` and ends with the last reason.
    """
    for local in (True, False):
        try:
            return load(local)
        except (OSError, ValueError) as error:
            last = error
    reason = " ".join(str(last).split())
    raise ValueError(f"{refusal} neither the Hub nor the cache of earlier downloads gave it ({reason})") from last
