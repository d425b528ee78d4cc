"""Long documents in parts, so that more rows than documents can walk at once; no target is lost between two parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Parts(Sequence[Any]):
    """Views of documents, cut every ``length`` steps; a document's last part is the shorter one.

    The last token of a part is also the first of the next, which predicts what follows it.

    Args:
        documents: tokens of each, (L,) with L >= 2.
        length: steps, and so targets, of a part.

    Raises:
        ValueError: a length below 1.
    """

    def __init__(self, documents: Sequence[Any], length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self._documents, self._length = documents, length
        self._places = [
            (index, start) for index in range(len(documents)) for start in range(0, len(documents[index]) - 1, length)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        document, start = self._places[index]
        return self._documents[document][start : start + self._length + 1]
