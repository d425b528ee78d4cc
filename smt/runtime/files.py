"""Files that are whole or not there, tensors in them, the permissions of the user's umask, and errors that name them."""

from __future__ import annotations

import json
import math
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor

# In the name of a file that is not whole yet; its ending stays, as some writers choose their format by it.
PARTIAL = ".partial"


def write_files(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Write files, each under a temporary name of its own; when all are on the disk, rename them. None is ever half there.

    Two that write the same file do not disturb each other: the last one to rename is the one that stays.

    Args:
        writers: by path, what writes to the path that it is given.

    Raises:
        OSError: one cannot be written, such as on a full disk; the message has its path, and nothing of it is left.
    """
    temporary = {path: _partial(path) for path in writers}
    try:
        for path, write in writers.items():
            with errors_of(path):
                write(temporary[path])
                follow_umask(temporary[path])
                sync(temporary[path])
        for path in writers:
            with errors_of(path):
                os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for folder in {path.parent for path in writers}:
        sync(folder)


def follow_umask(path: Path) -> None:
    """Give a file the permissions that a new one has; safetensors makes its own private."""
    new = _partial(path)
    new.open("xb").close()
    mode = new.stat().st_mode
    new.unlink()
    os.chmod(path, mode)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.stem}{PARTIAL}-{secrets.token_hex(4)}{path.suffix}")


def text_writer(text: str) -> Callable[[Path], Any]:
    """What writes text, in UTF-8, to a path."""
    return lambda path: path.write_text(text, encoding="utf-8")


def tensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Callable[[Path], None]:
    """What writes tensors, and in the file's header ``metadata``, as safetensors to a path."""

    def write(path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        try:
            save_file(on_cpu, path, metadata=dict(metadata or {"format": "pt"}))
        except SafetensorError as error:  # such as a full disk, which it does not call an OSError
            raise OSError(str(error)) from error

    return write


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: a damaged file.
    """
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def remove_partial(paths: Iterable[Path]) -> None:
    """Remove what a process that was killed while it wrote one of ``paths`` has left; nobody may be writing them now."""
    for path in paths:
        for left in path.parent.iterdir() if path.parent.is_dir() else ():
            if left.name.startswith(f"{path.stem}{PARTIAL}-") and left.suffix == path.suffix:
                left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk: a rename may otherwise outlive what was renamed."""
    if os.name == "nt" and path.is_dir():
        return  # which Windows cannot open
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Give an OSError inside the block the path that a reader knows, where it has none or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and PARTIAL not in str(error.filename):
            raise  # of another file, such as one that is copied
        if error.errno is None:
            raise OSError(f"{path} could not be written: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_folder(path: str | Path, name: str = "out") -> Path:
    """The path, if a folder that can be written is there or can be made there; nothing is left there.

    Raises:
        ValueError: it cannot; the message begins with ``name``.
    """
    path = Path(path)
    there = next(above for above in (path, *path.absolute().parents) if os.path.lexists(above))
    if not there.is_dir():
        what = f"{there} is a link to nothing" if there.is_symlink() and not there.exists() else f"{there} is none"
        raise ValueError(f"{name} must be a folder that can be written, {what}")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{name} must be a folder that can be written, {there} is not: {error.strerror}") from error
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return _mapping(path, values)


def finite(values: Any) -> Any:
    """Values for a JSON file, None in place of infinities and of what is no number: JSON has neither."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_yaml(path: Path, what: str = "a mapping") -> dict[str, Any]:
    """A YAML file that holds a mapping, which is called ``what``.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return _mapping(path, values, what)


def packaged_or_file(name: str | Path, packaged: Path, field: str) -> Path:
    """The YAML file ``name`` of the folder ``packaged``, or else the file of that path.

    Raises:
        ValueError: there is neither; the message begins with ``field``.
    """
    path = packaged / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in packaged.glob("*.yaml")))
        raise ValueError(f"{field} must be a YAML file or one of those packaged ({names}), got {str(name)!r}")
    return path


def _mapping(path: Path, values: Any, what: str = "a mapping") -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold {what}, got {type(values).__name__}")
    return values
