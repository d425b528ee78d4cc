"""Local text: files and folders, plain or gzipped, and JSON lines with a document each."""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from smt.data.documents import Corpus, Document, LeftOut, hold_out

JSON_LINES = (".jsonl", ".ndjson")
HALF_A_PAIR = "lines with half a surrogate pair"


def read_text(path: str | Path, *, text_field: str = "text") -> Corpus:
    """Read a file, or every file below a folder that is not hidden.

    A file is a document; each line of a ``.jsonl`` or ``.ndjson`` file is one, its text in ``text_field``, and a line is what
    a line feed ends. ``.gz`` is unpacked. Links to files are read, links to folders are not followed. What is empty, damaged,
    not UTF-8 in text or name, no file, or may not be read is left out and counted.

    Raises:
        ValueError: the path does not exist, is no file or folder, or too little of it is text.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"text must be a file or a folder, {path} does not exist")
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"text must be a file or a folder, {path} is neither; what is read more than once cannot be a pipe")
    return hold_out(str(path), partial(_documents, path, text_field))


def read_document(path: Path, name: str, skipped: LeftOut) -> Iterator[Document]:
    """The file as a document; none, counted in ``skipped``, where it is empty, not UTF-8, damaged or may not be read."""
    try:
        with _open(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped.note("not UTF-8", name)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        skipped.note("not readable as gzip", name)
    except PermissionError:
        skipped.note("files that may not be read", name)
    else:
        yield from _unless_empty(name, text, skipped)


def _documents(root: Path, text_field: str, skipped: LeftOut) -> Iterator[Document]:
    for path in _paths(root, skipped):
        name = _name(path, root)
        if not is_unicode(name):
            skipped.note("names that are not UTF-8", _spelled(name))
        elif (reason := _no_file(path)) is not None:
            skipped.note(reason, name)
        elif path.with_suffix("" if _is_packed(path) else path.suffix).suffix.lower() in JSON_LINES:
            yield from _lines(path, name, text_field, skipped)
        else:
            yield from read_document(path, name, skipped)


def _paths(root: Path, skipped: LeftOut) -> list[Path]:
    """``root``, or what is not hidden below it, in order."""
    if not root.is_dir():
        return [root]

    def unreadable(error: OSError) -> None:
        skipped.note("folders that may not be read", _spelled(_name(Path(error.filename), root)))

    found: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (path := Path(folder, name)).is_symlink():
                skipped.note("links to folders", _spelled(_name(path, root)))
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name


def _spelled(name: str) -> str:
    """A name of a file with its bytes that are not UTF-8 written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _no_file(path: Path) -> str | None:
    """Why there is no file to read; None where there is one."""
    try:
        mode = path.stat().st_mode
    except OSError:  # a link to nothing, or to itself
        return "links to nothing"
    return None if stat.S_ISREG(mode) else "pipes, sockets and devices"


def json_lines(path: Path, name: str, skipped: LeftOut) -> Iterator[tuple[str, Any]]:
    """The values of the lines of a file, which may be gzipped, each with its name, ``name:number``; blank lines have none.

    Lines that are no JSON in UTF-8, and what cannot be read of a file, are counted in ``skipped``.
    """
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from _values(line, f"{name}:{number}", skipped)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        skipped.note("not readable as gzip", name)
    except PermissionError:
        skipped.note("files that may not be read", name)


def _values(line: bytes, name: str, skipped: LeftOut) -> Iterator[tuple[str, Any]]:
    try:
        yield name, json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        skipped.note("not UTF-8", name)
    except (ValueError, RecursionError) as error:
        # Python also refuses what is JSON: integers of thousands of digits, and deep nesting.
        is_json = not isinstance(error, json.JSONDecodeError)
        skipped.note("lines with too long a number or too deep a nesting" if is_json else "lines that are not JSON", name)


def _lines(path: Path, root_name: str, text_field: str, skipped: LeftOut) -> Iterator[Document]:
    for name, values in json_lines(path, root_name, skipped):
        text = values.get(text_field) if isinstance(values, dict) else None
        if not isinstance(text, str):
            skipped.note(f"lines without a text in {text_field!r}", name)
        elif not is_unicode(text):
            skipped.note(HALF_A_PAIR, name)
        else:
            yield from _unless_empty(name, text, skipped)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can spell the text: half a surrogate pair, which JSON can, it cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _unless_empty(name: str, text: str, skipped: LeftOut) -> Iterator[Document]:
    if text.strip():
        yield Document(name, text)
    else:
        skipped.note("empty", name)


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if _is_packed(path) else path.open("rb")
