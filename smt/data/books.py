"""PG-19 (Rae et al., 2020, arXiv:1911.05507), and every other data set whose rows are whole documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING

from smt.data.documents import Document, LeftOut
from smt.data.hub import HubDataset, column

if TYPE_CHECKING:
    import datasets

TITLE_FIELD = "short_book_title"


def pg19(text_field: str) -> HubDataset:
    """Books published before 1919; a local copy may have the layout of its first release, ``train/10.txt`` and so on."""
    files = {split: f"{split}/*.txt" for split in ("train", "validation", "test")}
    return replace(dataset_of_documents("emozilla/pg19", text_field), files=files, options={"sample_by": "document"})


def dataset_of_documents(name: str, text_field: str, config: str | None = None) -> HubDataset:
    """A data set with a document per row, its text in ``text_field``."""
    return HubDataset(name, partial(rows_as_documents, text_field), f"rows of {text_field}", config)


def rows_as_documents(text_field: str, rows: datasets.Dataset, skipped: LeftOut) -> Iterator[Document]:
    """A document per row, named by its title where there is one, else by its number."""
    titles = column(rows, TITLE_FIELD) if TITLE_FIELD in rows.column_names else repeat(None)
    for index, (title, text) in enumerate(zip(titles, column(rows, text_field), strict=False)):
        if text and text.strip():
            yield Document(f"{index}" if title is None else f"{index} {title}", text)
        else:
            skipped.note("empty", f"row {index}")
