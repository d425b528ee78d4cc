"""Tokens of a split in one file, made once, mapped into memory, and shared by every process that reads it.

A folder holds ``tokens.bin``, all documents one after another in the narrowest unsigned integers that the vocabulary fits, and
``documents.json``, which says what they are; where documents name their targets ``counted.bin``, a byte per token that says
whether the loss counts it; where texts were left out ``left_out.txt``, which names them with the reason. The folder's name is
the hash of texts and tokenizer, so that a store that is there is the right one; it appears under its name only when it is
complete.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from smt.data.documents import Documents, DocumentsHash, LeftOut, hash_texts
from smt.data.tokenizer import Tokenizer
from smt.runtime.extras import needs_extra
from smt.runtime.files import errors_of, read_json, sync

if TYPE_CHECKING:
    import numpy as np

Made = TypeVar("Made")
# Of the layout of the files; another one does not read what an earlier one wrote.
LAYOUT = 4
TOKENS_FILE, COUNTED_FILE, DOCUMENTS_FILE = "tokens.bin", "counted.bin", "documents.json"
FIELDS = ("text_hash", "dtype", "names", "n_bytes", "offsets", "names_targets", "n_targets", "skipped")
LEFT_OUT_FILE = "left_out.txt"

ELSEWHERE = "name another folder with --cache, or in the environment variable SMT_CACHE"


class TokenStore(Sequence["np.ndarray"]):
    """The documents of a split as tokens: ``store[i]`` is the i-th, (L,) uint16 or uint32, a view of the mapped file.

    Sending one to another process sends its folder, not its tokens.

    Attributes:
        folder: where it is.
        names: of the documents.
        n_bytes: of UTF-8 text that the targets of each document spell: all of it, unless it names its targets.
        counted: of each document, (L,) bool, which tokens the loss counts; None: every document's all but the first.
        skipped: how many documents were left out, by reason; ``left_out_file`` names them.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a store.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or another version's.
        """
        with needs_extra("train"):
            import numpy as np
        self.folder = Path(folder)
        if not (self.folder / DOCUMENTS_FILE).is_file():
            raise FileNotFoundError(f"no tokens in {folder}: there is no {DOCUMENTS_FILE}")
        self._info: dict[str, Any] = read_json(self.folder / DOCUMENTS_FILE)
        layout = self._info.get("layout")
        if layout != LAYOUT:
            raise ValueError(f"{self.folder / DOCUMENTS_FILE} must have layout {LAYOUT}, got {layout!r}; delete {folder}")
        for name in FIELDS:
            if name not in self._info:
                raise ValueError(f"{self.folder / DOCUMENTS_FILE} is damaged: it lacks {name!r}; delete {self.folder}")
        self.names: list[str] = self._info["names"]
        self.n_bytes: list[int] = self._info["n_bytes"]
        self.skipped = Counter(self._info["skipped"])
        self._offsets: list[int] = self._info["offsets"]
        self._tokens = self._mapped(TOKENS_FILE, np.dtype(self._info["dtype"]))
        self.counted: list[np.ndarray] | None = None
        if self._info["names_targets"]:
            counted = self._mapped(COUNTED_FILE, np.dtype(bool))
            self.counted = [counted[start:stop] for start, stop in pairwise(self._offsets)]

    def _mapped(self, name: str, dtype: np.dtype) -> np.ndarray:
        import numpy as np

        if not (self.folder / name).is_file():
            raise ValueError(f"there is no {self.folder / name}; delete {self.folder}")
        there, expected = (self.folder / name).stat().st_size, dtype.itemsize * self._offsets[-1]
        if there != expected:
            raise ValueError(f"{self.folder / name} must have {expected} bytes, it has {there}; delete {self.folder}")
        return np.memmap(self.folder / name, dtype=dtype, mode="r").view(np.ndarray)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"document must lie in 0..{len(self) - 1}, got {index}")
        return self._tokens[self._offsets[index] : self._offsets[index + 1]]

    @property
    def text_hash(self) -> str:
        """Of names and texts alone, whatever they were read from (``smt.data.documents.hash_documents``)."""
        return self._info["text_hash"]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document, its two ends included."""
        return [stop - start for start, stop in pairwise(self._offsets)]

    @property
    def left_out_file(self) -> Path:
        """What was left out, a reason and a name on each line; not there where nothing was."""
        return self.folder / LEFT_OUT_FILE

    @property
    def n_targets(self) -> int:
        """Tokens that the loss counts."""
        return self._info["n_targets"]


def tokenise(documents: Documents, tokenizer: Tokenizer, cache: str | Path) -> TokenStore:
    """The store of ``documents`` in a folder of stores; made now unless it is there. Of several processes one makes it.

    Raises:
        ValueError: there is nothing to tokenise, or the cache cannot be written.
        OSError: the store cannot be written; the message has its path.
    """
    key = hash_texts(str(LAYOUT), documents.hash, tokenizer.hash)
    return made_once(Path(cache) / key[:32], lambda folder: _write(folder, documents, tokenizer), TokenStore)


def made_once(folder: Path, make: Callable[[Path], None], read: Callable[[Path], Made] = lambda folder: folder) -> Made:
    """What ``read`` finds in ``folder``, which ``make`` has filled, now if it is not there; other processes wait.

    A folder that ``read`` refuses is a cache that was damaged, and made again.

    Args:
        make: is given an empty folder, which is then renamed; if it fails nothing is left of it.
        read: raises ValueError or FileNotFoundError where what is there is not whole.

    Raises:
        ValueError: the cache that ``folder`` is in cannot be written.
    """
    from filelock import FileLock

    found = _read_if_whole(folder, read)
    if found is not None:
        return found
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with ExitStack() as held:
        with writes_cache(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(folder.with_name(f"{folder.name}.lock")))
            found = _read_if_whole(folder, read)  # another process may have made it
            if found is not None:
                return found
            shutil.rmtree(unfinished, ignore_errors=True)  # what an interrupted process left
            unfinished.mkdir()
        try:
            with errors_of(folder):
                make(unfinished)
                for path in unfinished.iterdir():
                    sync(path)
            shutil.rmtree(folder, ignore_errors=True)  # the damaged one
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync(folder.parent)
        return read(folder)


def _read_if_whole(folder: Path, read: Callable[[Path], Made]) -> Made | None:
    if not folder.is_dir():
        return None
    try:
        return read(folder)
    except (ValueError, FileNotFoundError) as error:
        warnings.warn(f"{error}: it is made again", stacklevel=2)
        return None


@contextmanager
def writes_cache(folder: Path) -> Iterator[None]:
    """Turn what the system refuses inside the block into an error that says how to keep the cache elsewhere."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write to the cache {folder} ({error.strerror or error}): {ELSEWHERE}") from error


def _write(folder: Path, documents: Documents, tokenizer: Tokenizer) -> None:
    import numpy as np

    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    names, n_bytes, offsets, skipped = [], [], [0], LeftOut()
    names_targets, n_targets, text_hash = False, 0, DocumentsHash()
    with (folder / TOKENS_FILE).open("wb") as file, (folder / COUNTED_FILE).open("wb") as counted_file:
        for document, tokens, counted in tokenizer.encode_documents(documents.read(skipped)):
            file.write(np.array(tokens, dtype=dtype).tobytes())
            names_targets |= counted is not None
            flags = np.arange(len(tokens)) > 0 if counted is None else np.array(counted)
            counted_file.write(flags.tobytes())
            n_targets += int(flags.sum())
            text_hash.add(document)
            names.append(document.name)
            n_bytes.append(document.n_target_bytes)
            offsets.append(offsets[-1] + len(tokens))
    if not names_targets:  # which is known only when all documents have been read
        (folder / COUNTED_FILE).unlink()
    if not names:
        raise ValueError(f"a split must have a document, this one has none{skipped and f', {skipped}'}")
    info = {
        "layout": LAYOUT,
        "text_hash": text_hash.hexdigest(),
        "dtype": dtype.name,
        "names": names,
        "n_bytes": n_bytes,
        "offsets": offsets,
        "names_targets": names_targets,
        "n_targets": n_targets,
        "skipped": dict(skipped),
    }
    if skipped:
        lines = [f"{reason}\t{name!r}\n" for reason, names in sorted(skipped.names.items()) for name in names]
        (folder / LEFT_OUT_FILE).write_text("".join(lines), encoding="utf-8")
    (folder / DOCUMENTS_FILE).write_text(json.dumps(info), encoding="utf-8")
