"""WikiText (Merity et al., 2016, arXiv:1609.07843): published as lines, put together again to whole articles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from smt.data.documents import Document, LeftOut
from smt.data.hub import HubDataset, column

if TYPE_CHECKING:
    import datasets

HUB_NAME = "Salesforce/wikitext"
# `` = Title = ``; the headings inside an article have more signs: `` = = Section = = ``.
_TITLE = re.compile(r"= (?!=)(.+) =")


def wikitext(config: str) -> HubDataset:
    """``wikitext-2-raw-v1`` or ``wikitext-103-raw-v1``; a local copy may be the folder of ``wiki.train.raw`` or ``.tokens``."""
    files = {"train": "wiki.train.*", "validation": "wiki.valid.*", "test": "wiki.test.*"}
    return HubDataset(HUB_NAME, rows_as_articles, "articles", config, files)


def rows_as_articles(rows: datasets.Dataset, skipped: LeftOut) -> Iterator[Document]:
    """A document per article of the column ``text``."""
    return articles(column(rows, "text"))


def articles(lines: Iterable[str]) -> Iterator[Document]:
    """Lines, with or without their line ends -> articles.

    An article begins at a heading of the first level between two empty lines: a text has lines that only look like one.
    """
    title, gathered, before = "before the first title", [], ""
    candidate: str | None = None
    for line in lines:
        line = line if line.endswith("\n") else f"{line}\n"
        if candidate is not None:
            if not line.strip():
                heading = gathered.pop()
                yield from _article(title, gathered)
                title, gathered = candidate, [heading]
            candidate = None
        match = _TITLE.fullmatch(line.strip()) if not before.strip() else None
        candidate = match[1] if match else None
        gathered.append(line)
        before = line
    yield from _article(title, gathered)


def _article(title: str, lines: list[str]) -> Iterator[Document]:
    text = "".join(lines)
    if text.strip():
        yield Document(title, text)
