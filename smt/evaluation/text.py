"""Held-out documents as tokens of one tokenizer, with the sizes of their text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from smt.data.documents import Corpus
from smt.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOutText:
    """Documents to evaluate on.

    Attributes:
        source: where they come from, in words.
        names: of the documents.
        documents: tokens of each, (L,) int64, an end of document before and after its text.
        n_bytes, n_characters: of the text of all documents; the ends of documents have none.
    """

    source: str
    names: tuple[str, ...]
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
        corpus.source,
        tuple(document.name for document in read),
        tuple(torch.tensor(tokens) for _, tokens, _ in tokenizer.encode_documents(read)),
        sum(document.n_bytes for document in read),
        sum(len(document.text) for document in read),
    )
