"""Local text: files and folders, plain or gzipped, and JSON lines with a document each."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from smt.data.documents import Corpus, Document, hold_out


def read_text(path: str | Path, *, text_field: str = "text") -> Corpus:
    """Read a file, or every file below a folder that is not hidden.

    A file is a document; each line of a ``.jsonl`` file is one, its text in ``text_field``. ``.gz`` is unpacked. What is
    empty, not UTF-8 or damaged is left out and counted.

    Raises:
        ValueError: the path does not exist, or too little of it is text.
    """
    if not Path(path).exists():
        raise ValueError(f"text must be a file or a folder, {path} does not exist")
    return hold_out(str(path), partial(_documents, Path(path), text_field))


def read_document(path: Path, name: str, skipped: Counter[str]) -> Iterator[Document]:
    """The file as a document; none, counted in ``skipped``, where it is empty, not UTF-8 or damaged."""
    try:
        with _open(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
    except (gzip.BadGzipFile, EOFError, zlib.error):
        skipped["not readable as gzip"] += 1
    else:
        yield from _unless_empty(name, text, skipped)


def _documents(root: Path, text_field: str, skipped: Counter[str]) -> Iterator[Document]:
    for path in [root] if root.is_file() else sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix() if path != root else path.name
        if not path.is_file() or (path != root and any(part.startswith(".") for part in Path(name).parts)):
            continue
        if ".jsonl" in path.suffixes[-2:]:
            yield from _lines(path, name, text_field, skipped)
        else:
            yield from read_document(path, name, skipped)


def _lines(path: Path, name: str, text_field: str, skipped: Counter[str]) -> Iterator[Document]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from _line(line, f"{name}:{number}", text_field, skipped)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        skipped["not readable as gzip"] += 1


def _line(line: bytes, name: str, text_field: str, skipped: Counter[str]) -> Iterator[Document]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return
    except json.JSONDecodeError:
        skipped["lines that are not JSON"] += 1
        return
    text = values.get(text_field) if isinstance(values, dict) else None
    if isinstance(text, str):
        yield from _unless_empty(name, text, skipped)
    else:
        skipped[f"lines without a text in {text_field!r}"] += 1


def _unless_empty(name: str, text: str, skipped: Counter[str]) -> Iterator[Document]:
    if text.strip():
        yield Document(name, text)
    else:
        skipped["empty"] += 1


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
