"""Documents: whole texts with a name, split into training and held-out ones before anything else is done with them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# A folder holds out every twentieth file, a single file its last twentieth.
HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class Document:
    """One text, never cut or joined: memory is reset before it and runs through all of it."""

    name: str
    text: str

    @property
    def n_bytes(self) -> int:
        """Length in UTF-8, the unit of bits per byte."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents held out, and which files were left out and why.

    Attributes:
        source: where the documents come from, in words.
        train, validation: disjoint, each in sorted order of names.
        skipped: how many files were left out, by reason.
    """

    source: str
    train: list[Document]
    validation: list[Document]
    skipped: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """One line of counts and sizes."""
        sizes = [f"{len(part)} files, {sum(d.n_bytes for d in part) / 1e6:.2f} MB" for part in (self.train, self.validation)]
        skipped = "".join(f"; {count} {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{self.source}: training {sizes[0]}; held out {sizes[1]}{skipped}"


def read_document(path: Path, name: str, skipped: Counter[str]) -> Document | None:
    """The file as a document; None, counted in ``skipped``, where it is empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return None
    if not text.strip():
        skipped["empty"] += 1
        return None
    return Document(name, text)


def read_text(path: str | Path) -> Corpus:
    """Read a local UTF-8 text file, or every file below a folder that is not hidden.

    A folder's files are documents, and every twentieth in sorted order is held out. Of a single file its end is held out.

    Raises:
        ValueError: the path does not exist, or too little of it is text.
    """
    root = Path(path)
    if not root.exists():
        raise ValueError(f"text must be a file or a folder, {path} does not exist")
    skipped: Counter[str] = Counter()
    if root.is_file():
        document = read_document(root, root.name, skipped)
        if document is None:
            raise ValueError(f"text must be UTF-8 text, {path} is {next(iter(skipped))}")
        return _split_file(document, str(path))
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(root))]
    read = (read_document(file, file.relative_to(root).as_posix(), skipped) for file in files)
    documents = [document for document in read if document is not None]
    if len(documents) == 1:
        return _split_file(documents[0], str(path))
    if not documents:
        raise ValueError(f"text must hold UTF-8 text, of the {len(files)} files in {path} none does")
    held_out = set(range(HELD_OUT_EVERY - 1, len(documents), HELD_OUT_EVERY)) or {len(documents) - 1}
    return Corpus(
        source=str(path),
        train=[document for index, document in enumerate(documents) if index not in held_out],
        validation=[document for index, document in enumerate(documents) if index in held_out],
        skipped=skipped,
    )


def _split_file(document: Document, source: str) -> Corpus:
    cut = len(document.text) - len(document.text) // HELD_OUT_EVERY
    if cut == len(document.text):
        raise ValueError(f"text must have at least {HELD_OUT_EVERY} characters, {source} has {len(document.text)}")
    parts = Document(document.name, document.text[:cut]), Document(f"{document.name} (end)", document.text[cut:])
    return Corpus(source=source, train=[parts[0]], validation=[parts[1]])


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
