"""Real text that every Python carries: the source of its own standard library, one document per file."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from smt.data.documents import Corpus, Document, LeftOut, hash_documents, split
from smt.data.local import read_document

# Tests repeat themselves and what they test; installed packages are not the standard library.
LEFT_OUT_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

# Whole packages, about 6 % of the bytes, that no training file belongs to nor resembles: 2 to 7 % of their lines of 20
# characters and more occur in any other package, most of these imports and one-line idioms.
HELD_OUT_PACKAGES = ("email", "http", "json", "tomllib", "wsgiref", "zoneinfo")


def read_stdlib(root: str | Path | None = None) -> Corpus:
    """The ``.py`` files of the standard library in sorted order, with ``HELD_OUT_PACKAGES`` held out.

    Args:
        root: the library's folder; None: that of the Python that runs.

    Raises:
        ValueError: no source there, or none of the packages to hold out.
    """
    folder = Path(root if root is not None else sysconfig.get_path("stdlib"))
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*.py"))}
    paths = {name: path for name, path in paths.items() if not LEFT_OUT_FOLDERS.intersection(name.parts[:-1])}
    n_held_out = sum(name.parts[0] in HELD_OUT_PACKAGES for name in paths)
    if not 0 < n_held_out < len(paths):
        raise ValueError(
            f"no source of Python's standard library in {folder}: {len(paths) - n_held_out} training files, {n_held_out} to "
            "hold out. Install the full Python, or name a text of your own with --text PATH"
        )

    def read(skipped: LeftOut) -> Iterator[Document]:
        for name, path in paths.items():
            yield from read_document(path, name.as_posix(), skipped)

    def split_of(name: str) -> str:
        return "validation" if name.split("/")[0] in HELD_OUT_PACKAGES else "train"

    return split("Python's standard library", read, split_of, hash_documents(read(LeftOut())))
