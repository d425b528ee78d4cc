"""Documents: whole texts with a name, in splits that are read while they are iterated: a corpus need not fit in memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

# About one document in twenty is held out where a source has no split of its own; of a single document its last twentieth.
HELD_OUT_EVERY = 20
_RANKS = 2**64


@dataclass(frozen=True)
class Document:
    """One text, never cut or joined: memory is reset before it and runs through all of it.

    Attributes:
        name: of the document.
        text: all that is read.
        targets: the parts of the text, from one character up to another, that the loss counts; None: all of it, and its end.
    """

    name: str
    text: str
    targets: tuple[tuple[int, int], ...] | None = None

    @property
    def n_bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode("utf-8"))

    @property
    def n_target_bytes(self) -> int:
        """Length in UTF-8 of what the loss counts, the unit of bits per byte."""
        if self.targets is None:
            return self.n_bytes
        return sum(len(self.text[start:stop].encode("utf-8")) for start, stop in self.targets)


class LeftOut(Counter[str]):
    """How many texts were left out, by reason, and which.

    Attributes:
        names: by reason, what was left out: a file, a line of one, or a row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, list[str]] = {}

    def note(self, reason: str, name: str) -> None:
        """Count one more."""
        self[reason] += 1
        self.names.setdefault(reason, []).append(name)

    def include(self, other: LeftOut) -> None:
        """Count what ``other`` counts too."""
        self.update(other)
        for reason, names in other.names.items():
            self.names.setdefault(reason, []).extend(names)

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.items()))


# Yields the documents in their order and counts what it leaves out, by reason.
Read = Callable[[LeftOut], Iterator[Document]]


@dataclass(frozen=True)
class Documents:
    """The documents of one split, read anew each time they are iterated.

    Attributes:
        read: given what to count in, yields the documents in order and counts what it leaves out, by reason.
        hash: another one for other names, texts or order.
    """

    read: Read
    hash: str

    def __iter__(self) -> Iterator[Document]:
        return self.read(LeftOut())


@dataclass(frozen=True)
class Corpus:
    """Disjoint splits of one source.

    Attributes:
        source: where the documents come from, in words.
        train, validation: to train on, and to choose by.
        test: for the last word; None where the source has none.
    """

    source: str
    train: Documents
    validation: Documents
    test: Documents | None = None


def hash_texts(*texts: str) -> str:
    """A hexadecimal SHA-256 of the texts and of where one ends and the next begins."""
    return _hash_encoded(text.encode("utf-8") for text in texts)


def hash_documents(documents: Iterable[Document]) -> str:
    """A hexadecimal SHA-256 of all names, texts and targets."""
    digest = DocumentsHash()
    for document in documents:
        digest.add(document)
    return digest.hexdigest()


class DocumentsHash:
    """``hash_documents``, one document after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, document: Document) -> None:
        """The next one."""
        _update(self._digest, (part.encode("utf-8") for part in _parts(document)))

    def hexdigest(self) -> str:
        """Of those so far."""
        return self._digest.hexdigest()


def split(source: str, read: Read, split_of: Callable[[str], str], content: str, *, test: bool = False) -> Corpus:
    """Sort the documents of one stream into splits by their names.

    Args:
        source: where they come from, in words.
        read: yields all documents.
        split_of: the name of a document -> ``train``, ``validation`` or ``test``.
        content: a hash of everything that ``read`` yields.
        test: whether there is a test split.
    """

    def chosen(name: str, skipped: LeftOut) -> Iterator[Document]:
        # What is left out belongs to no split; it is counted once, with the training documents.
        counted = skipped if name == "train" else LeftOut()
        return (document for document in read(counted) if split_of(document.name) == name)

    names = ("train", "validation", "test")[: 2 + test]
    return Corpus(source, *(Documents(partial(chosen, name), hash_texts(content, name)) for name in names))


def hold_out(source: str, read: Read) -> Corpus:
    """Hold out about one document in ``HELD_OUT_EVERY``, chosen by the hash of its name: others do not change its split.

    At least one document is held out and at least one is not; a single document is cut in two, and its end held out.

    Raises:
        ValueError: no document, or a single one that is too short to cut or names its targets.
    """
    lowest, highest, n_documents = _RANKS, -1, 0
    content, skipped = hashlib.sha256(), LeftOut()
    for document in read(skipped):
        content.update(hash_texts(*_parts(document)).encode())
        rank = rank_of(document.name)
        lowest, highest, n_documents = min(lowest, rank), max(highest, rank), n_documents + 1
    if n_documents == 0:
        raise ValueError(f"text must hold UTF-8 text, {source} holds none: {skipped or 'nothing there'}")
    if n_documents == 1:
        return _hold_out_end(source, read)
    limit = held_out_below(lowest, highest)
    return split(source, read, lambda name: "validation" if rank_of(name) < limit else "train", content.hexdigest())


def held_out_below(lowest: int, highest: int) -> int:
    """The rank below which about one in ``HELD_OUT_EVERY`` is held out: at least the lowest there is, never the highest."""
    return min(max(_RANKS // HELD_OUT_EVERY, lowest + 1), highest)


def _hold_out_end(source: str, read: Read) -> Corpus:
    skipped = LeftOut()
    (document,) = read(skipped)
    if document.targets is not None:
        raise ValueError(f"text must be more than one document where they name their targets, {source} is one")
    cut = len(document.text) - len(document.text) // HELD_OUT_EVERY
    if cut == len(document.text):
        raise ValueError(f"text must have at least {HELD_OUT_EVERY} characters, {source} has {len(document.text)}")
    parts = {"train": document.text[:cut], "validation": document.text[cut:]}

    def both(counted: LeftOut) -> Iterator[Document]:
        counted.include(skipped)
        return (Document(document.name if name == "train" else f"{document.name} (end)", part) for name, part in parts.items())

    content = hash_texts(document.name, document.text)
    return split(source, both, lambda name: "train" if name == document.name else "validation", content)


def rank_of(name: str) -> int:
    """By which a name is held out or not, whatever others there are: uniform in [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")


def _parts(document: Document) -> tuple[str, str, str]:
    """What a hash of the document is of."""
    return document.name, document.text, str(document.targets)


def _hash_encoded(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    _update(digest, pieces)
    return digest.hexdigest()


def _update(digest: Any, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "big"))
        digest.update(piece)
