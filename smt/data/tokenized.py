"""From settings to tokens: read the source, train or load the tokenizer, tokenise what a run reads; what was done is reused."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from smt.data.documents import Corpus, hash_texts
from smt.data.settings import DataConfig
from smt.data.sources import cache_folder, read_corpus
from smt.data.store import TokenStore, made_once, tokenise
from smt.data.tokenizer import TRAINED, Tokenizer


@dataclass(frozen=True)
class TokenizedCorpus:
    """The splits of a source that a run reads, as tokens.

    Attributes:
        source: where the text comes from, in words.
        tokenizer: what made the tokens.
        train, validation: to train on, and to choose by.
    """

    source: str
    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore

    def describe(self) -> str:
        """One line of counts and sizes, and of what was left out."""
        parts = {"training": self.train, "held out": self.validation}
        sizes = [f"{name} {_sizes(store)}" for name, store in parts.items()]
        left_out = [
            f"{', '.join(f'{count} {reason}' for reason, count in sorted(store.skipped.items()))} ({store.left_out_file})"
            for store in parts.values()
            if store.skipped
        ]
        return f"{self.source}: {'; '.join(sizes)}" + (f"; left out: {'; '.join(left_out)}" if left_out else "")

    def warning(self, window: int) -> str | None:
        """How many training documents never fill a window of ``window`` tokens: no memory is needed to read them."""
        short = sum(length - 1 < window for length in self.train.lengths)
        if not short:
            return None
        return f"{short:,} of {len(self.train):,} training documents are shorter than one window of {window} tokens"

    def idle_rows(self, rows: int, part_length: int | None) -> str | None:
        """How many of ``rows`` rows that begin together have no training document, and which ``part_length`` gives them one."""
        steps = [length - 1 for length in self.train.lengths]

        def n_parts(length: int) -> int:
            return sum(-(-count // length) for count in steps)

        n_documents = n_parts(part_length or max(steps))
        if n_documents >= rows:
            return None
        longest = bisect_right(range(1, max(steps) + 1), -rows, key=lambda length: -n_parts(length))
        advice = f"; --part_length {longest} or less gives each row one" if longest else ""
        return f"{rows - n_documents} of {rows} rows are idle: there are {n_documents} documents to train on{advice}"


def _sizes(store: TokenStore) -> str:
    if store.counted is None:
        return f"{len(store)} documents, {sum(store.n_bytes) / 1e6:.2f} MB, {store.n_targets:,} tokens"
    n_steps = sum(store.lengths) - len(store)
    return f"{len(store)} documents, {n_steps:,} tokens, of which the loss counts {store.n_targets:,}"


def tokenize_corpus(settings: DataConfig, vocab_size: int) -> TokenizedCorpus:
    """Read, tokenise and keep under ``cache_folder(settings)`` what ``settings`` name.

    Args:
        vocab_size: of the model: a tokenizer that is trained learns at most this many tokens; any other may not have more.

    Raises:
        MissingExtraError: a package that the source or the tokenizer needs is not installed.
        ValueError: a source or a tokenizer that cannot be read or reached, or a tokenizer with too many tokens.
    """
    corpus = read_corpus(settings)
    cache = cache_folder(settings)
    tokenizer = _tokenizer(settings.tokenizer, corpus, vocab_size, cache / "tokenizers")
    train, validation = (tokenise(documents, tokenizer, cache / "tokens") for documents in (corpus.train, corpus.validation))
    return TokenizedCorpus(corpus.source, tokenizer, train, validation)


def _tokenizer(name: str, corpus: Corpus, vocab_size: int, cache: Path) -> Tokenizer:
    if name not in TRAINED:
        tokenizer = Tokenizer.pretrained(name)
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(f"vocab_size must be at least {tokenizer.vocab_size} for the tokenizer {name!r}, got {vocab_size}")
        return tokenizer
    # Kept, because training a unigram model twice need not give the same pieces to the last bit.
    folder = cache / hash_texts(corpus.train.hash, name, str(vocab_size))[:32]
    return made_once(folder, lambda empty: Tokenizer.train(corpus.train, vocab_size, name).save(empty), Tokenizer.load)
