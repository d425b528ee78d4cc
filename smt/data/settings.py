"""The data of a run: which text, which tokens, and how documents become batches."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from smt.data.recall import RecallTask
from smt.data.sources import SOURCES
from smt.runtime.fields import check_at_least, check_fields, expand_home


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, which tokens, and how documents become batches.

    Args:
        source: ``stdlib`` (the source of Python's standard library), ``shakespeare``, ``wikitext2``, ``wikitext103``,
            ``pg19``, ``recall`` (made-up associative recall), ``dataset`` or ``text``.
        text: a local file or folder, plain, .gz or .jsonl; naming one chooses the source ``text``.
        dataset: for the sources that are data sets, another name on the Hub or a local copy; None: the source's own. For
            ``dataset`` it must be given: each of its rows is a document.
        dataset_config: for ``dataset``, which of its configurations.
        text_field: the column of a data set, or the field of .jsonl, that holds the text.
        pairs: for stage ``orpo``, a file of JSON lines with the texts ``prompt``, ``chosen`` and ``rejected``.
        tokenizer: ``bpe`` or ``unigram``, trained on the training documents with the model's ``vocab_size``; else a folder
            with a Hugging Face tokenizer or GPT-2's two files, or a name on the Hub.
        recall: for the source ``recall``: fields of ``smt.data.recall.RecallTask``.
        cache: the folder that keeps tokens, tokenizers and downloads from run to run; None: the user's cache folder.
        batch_size: sequences in a batch (rows); each reads one document at a time. In stage ``orpo`` pairs, of two rows each.
        chunk_length: steps of each row in one batch; gradients stop at its start, memory does not. In stage ``orpo`` the
            longest pair: of longer ones the prompt is cut on the left.
        part_length: cut training documents into parts of this many tokens, each read as a document of its own, where there
            are fewer documents than rows; None: documents stay whole. Held-out documents always do.
        lanes: groups of rows that take turns, batch by batch, so that consecutive steps see different documents.
        eval_batch_size: rows in evaluation, and pairs.
        eval_chunk_length: steps of each row in one batch of evaluation.
        eval_documents: how many held-out documents are evaluated, the first of them; None: all.
    """

    source: str = "stdlib"
    text: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    text_field: str = "text"
    pairs: str | None = None
    tokenizer: str = "bpe"
    recall: dict[str, int] = field(default_factory=dict)
    cache: str | None = None
    batch_size: int = 8
    chunk_length: int = 128
    part_length: int | None = None
    lanes: int = 32
    eval_batch_size: int = 16
    eval_chunk_length: int = 512
    eval_documents: int | None = None

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "source": tuple(SOURCES),
        "recall": tuple(item.name for item in fields(RecallTask)),
    }

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("text", "dataset", "pairs", "tokenizer", "cache"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, expand_home(getattr(self, name)))
        if self.text is not None:
            object.__setattr__(self, "source", "text")
        for name in ("text", "dataset"):
            if self.source == name and getattr(self, name) is None:
                raise ValueError(f"{name} must be given for the source {name!r}, got None")
        RecallTask(**self.recall)
        check_at_least(self, 1, "batch_size", "chunk_length", "part_length", "lanes")
        check_at_least(self, 1, "eval_batch_size", "eval_chunk_length", "eval_documents")
