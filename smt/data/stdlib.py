"""Real text that every Python carries: the source of its own standard library, one document per file."""

from __future__ import annotations

import sysconfig
from collections import Counter
from pathlib import Path

from smt.data.documents import Corpus, Document, read_document

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
    root = Path(root if root is not None else sysconfig.get_path("stdlib"))
    skipped: Counter[str] = Counter()
    parts: dict[bool, list[Document]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT_FOLDERS.intersection(name.parts[:-1]):
            continue
        document = read_document(path, name.as_posix(), skipped)
        if document is not None:
            parts[name.parts[0] in HELD_OUT_PACKAGES].append(document)
    if not parts[False] or not parts[True]:
        raise ValueError(
            f"no source of Python's standard library in {root}: {len(parts[False])} training files, {len(parts[True])} to "
            "hold out. Install the full Python, or name a text of your own with --text PATH"
        )
    return Corpus("Python's standard library", parts[False], parts[True], skipped)
