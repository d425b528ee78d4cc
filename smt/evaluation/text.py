"""Held-out documents as tokens of one tokenizer, with the sizes of their text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smt.data.documents import Corpus, hash_documents
from smt.data.tokenizer import Tokenizer
from smt.runtime.files import read_json

# Which text a run reads.
TEXT_FILE = "text.json"


@dataclass(frozen=True)
class HeldOutText:
    """Documents to evaluate on.

    Attributes:
        documents: tokens of each, (L,) int64, an end of document before and after its text.
        n_bytes, n_characters: of the text of all documents; the ends of documents have none.
    """

    documents: tuple[Tensor, ...]
    n_bytes: int
    n_characters: int

    @property
    def n_targets(self) -> int:
        """Tokens to predict: all but the first of each document."""
        return sum(len(document) - 1 for document in self.documents)


def held_out_text(corpus: Corpus, tokenizer: Tokenizer, count: int | None = None) -> HeldOutText:
    """The first ``count`` validation documents of ``corpus``; None: all.

    Raises:
        ValueError: there is none.
    """
    read = list(islice(corpus.validation, count))
    if not read:
        raise ValueError(f"an evaluation needs a held-out document, {corpus.source} has none")
    return HeldOutText(
        tuple(torch.tensor(tokens, device="cpu") for _, tokens, _ in tokenizer.encode_documents(read)),
        sum(document.n_bytes for document in read),
        sum(len(document.text) for document in read),
    )


def text_of_run(folder: str | Path) -> dict[str, Any]:
    """Which text a run reads: its ``source`` in words, and hashes of its splits, ``training`` and ``held_out``.

    Nothing for a checkpoint that names no text.
    """
    path = Path(folder) / TEXT_FILE
    return read_json(path) if path.is_file() else {}


def other_text(corpus: Corpus, run: str | Path) -> str | None:
    """What to say if the held-out documents of ``corpus`` are not those on which the run in that folder was evaluated."""
    there = text_of_run(run).get("held_out")
    if there is None or there == hash_documents(corpus.validation):
        return None
    return f"the held-out text of {corpus.source} is not that with which the run in {run} began"
